"""What a cycle writes to `metrics`: intervals, protocols, and the finetuned models on request."""

from pathlib import Path

from cycle import FinishedCycle, bootstrap, copied, stamps

from storage import Lake, query, registry, rounds

RECALLS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall"]
MATCHING = ["itm_auc_random", "itm_ap_random", "itm_auc_hard", "itm_ap_hard"]
CAPTIONS = {"cider", "bleu4", "rouge_l"}
HELD_OUT = "SELECT * FROM metrics WHERE dataset = 'heldout'"


def test_every_held_out_figure_has_its_interval_and_protocol(finished: FinishedCycle) -> None:
    rows = query(Lake.open(str(finished.lake), read_only=True), HELD_OUT).to_pylist()
    assert {row["metric"] for row in rows} >= {*RECALLS, *MATCHING, *CAPTIONS, "caption_truth"}
    for number in {row["round"] for row in rows}:  # another test may have added a round
        assert len({row["model_id"] for row in rows if row["round"] == number}) == 2
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"], row
        assert row["protocol"] == "zero-shot"


def test_evaluate_with_finetuned_adds_captioner_and_filter_and_leaves_the_rest(
    finished: FinishedCycle, tmp_path: Path
) -> None:
    cycle = copied(finished, tmp_path)
    lake = Lake.open(str(cycle.lake))
    before = stamps(cycle.lake, "tables/metrics")
    compared = query(lake, "SELECT best_mean_recall FROM compare_rounds").to_pylist()
    done = bootstrap(
        "evaluate", "--config", str(cycle.config), "--set", "evaluate.finetuned=true", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    after = stamps(cycle.lake, "tables/metrics")
    assert {path: after[path] for path in before} == before
    found = query(lake, f"{HELD_OUT} AND protocol = 'finetuned'").to_pylist()
    by_model: dict[str, set[str]] = {}
    for row in found:
        by_model.setdefault(row["model_id"], set()).add(row["metric"])
    latest = rounds.latest_round(lake)
    assert latest is not None
    captioner, judge = (registry.find(lake, role, latest.round) for role in ("captioner", "filter"))
    assert captioner is not None
    assert judge is not None
    assert by_model.pop(judge.model_id) == {*RECALLS, *MATCHING}
    assert by_model.pop(captioner.model_id) - {"meteor"} == CAPTIONS
    assert by_model == {}
    assert query(lake, "SELECT best_mean_recall FROM compare_rounds").to_pylist() == compared
