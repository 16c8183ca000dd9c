"""The audit of a finished cycle: canaries are planted, scored, and never trained on."""

import json
from pathlib import Path

import pytest
from cycle import FinishedCycle, bootstrap, copied, stamps, write_settings

from flows.audit.sweep import sweep
from storage import Lake, TrainSetRef, connect, layout, open_trainset, query
from storage.tables import drop_part, list_parts

KINDS = {"true", "random", "hard", "swapped"}


@pytest.fixture(scope="module")
def lake(finished: FinishedCycle) -> Lake:
    return Lake.open(str(finished.lake), read_only=True)


def rows(lake: Lake, sql: str) -> list[dict]:
    return query(lake, sql).to_pylist()


def test_every_canary_image_has_a_true_text_and_its_mismatches(lake: Lake) -> None:
    planted = rows(lake, "SELECT * FROM canaries WHERE round = 1")
    drawn = {row["image_id"] for row in rows(lake, "FROM canary_draws WHERE is_canary")}
    assert drawn
    assert {row["image_id"] for row in planted} == drawn
    human = {
        (row["image_id"], row["caption"])
        for row in rows(lake, "FROM captions WHERE source = 'human'")
    }
    for row in planted:
        assert 0 <= row["itm_prob"] <= 1
        assert -1 <= row["judge_itc_sim"] <= 1
        if row["kind"] == "written":
            assert row["truth"] is None
            continue
        assert row["kind"] in KINDS
        assert row["truth"] == (row["kind"] == "true")
        assert ((row["image_id"], row["caption"]) in human) == row["truth"]
    kinds = [(row["image_id"], row["kind"]) for row in planted]
    assert len(kinds) == len(set(kinds))


def test_canaries_are_in_no_training_set_and_no_view_of_pairs(
    finished: FinishedCycle, lake: Lake
) -> None:
    drawn = {row["image_id"] for row in rows(lake, "FROM canary_draws WHERE is_canary")}
    trained = {row["trained_on"] for row in rows(lake, "FROM models WHERE trained_on IS NOT NULL")}
    assert len(trained) >= 3
    for fingerprint in trained:
        path = layout.trainset(fingerprint)
        ref = TrainSetRef(name="x", path=path, fingerprint=fingerprint, num_rows=0)
        shown = set(open_trainset(lake, ref).distinct("image_id"))
        assert shown
        assert not shown & drawn
    for view in ("human", "raw", "clean", "rejected"):
        assert not drawn & {row["image_id"] for row in rows(lake, f"FROM {view}")}


def test_audit_measures_the_filter_and_the_noise(lake: Lake) -> None:
    found = {
        (row["dataset"], row["metric"]): row
        for row in rows(lake, "FROM metrics WHERE dataset IN ('canaries', 'judge')")
    }
    (filter_id,) = [row["model_id"] for row in rows(lake, "FROM models WHERE role = 'filter'")]
    assert {row["model_id"] for row in found.values()} == {filter_id}
    wanted = [
        *(("canaries", f"filter_false_keep_{kind}") for kind in KINDS - {"true"}),
        *(("canaries", f"noise_{when}{of}") for when in ("before", "left") for of in ("", "_web")),
        ("canaries", "filter_recall"),
        ("canaries", "filter_precision"),
        ("judge", "judge_agreement"),
    ]
    for name in wanted:
        row = found[name]
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1, name
    # in the first round the judge is the filter itself
    assert found["judge", "judge_agreement"]["value"] == 1.0
    assert found["judge", "judge_gap"]["value"] == pytest.approx(0, abs=1e-5)


def test_judged_texts_are_the_rounds_own(lake: Lake) -> None:
    strangers = rows(
        lake, "FROM judgements j ANTI JOIN active_decisions d ON d.caption_id = j.caption_id"
    )
    assert strangers == []
    sources = rows(lake, "SELECT source, count(*) AS n FROM judgements GROUP BY ALL ORDER BY ALL")
    assert sources == [{"source": "synthetic", "n": 20}, {"source": "web", "n": 20}]


def test_sweep_keeps_what_a_decision_at_the_threshold_keeps(lake: Lake) -> None:
    with connect(lake) as con:
        points = sweep(con, 1, [0.1, 0.2, 0.35, 0.9])
    for point in points:
        (kept,) = rows(
            lake,
            f"SELECT count(*) AS n FROM verdicts WHERE round = 1 AND source = '{point.source}' "
            f"AND itm_prob >= {point.threshold}",
        )
        assert point.kept == kept["n"]
        assert point.texts >= point.kept


def test_audit_again_finds_everything(finished: FinishedCycle, api_url: str) -> None:
    before = stamps(finished.lake, "tables")
    again = bootstrap(
        "audit", "--config", str(finished.config), cwd=finished.folder, api_url=api_url
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "true pairs kept (recall)" in again.stdout
    assert stamps(finished.lake, "tables") == before


def test_too_few_canaries_are_told_apart_from_none(
    finished: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    cycle = copied(finished, tmp_path)
    opened = Lake.open(str(cycle.lake))
    for table in ("canaries", "judgements"):
        for part in list_parts(opened, table):
            drop_part(opened, part)
    settings = json.loads(cycle.config.read_text())
    settings["audit"] |= {"min_canary_images": 400, "judge_sample": 0}
    config = write_settings(tmp_path / "few.yaml", settings)
    done = bootstrap("audit", "--config", str(config), cwd=tmp_path, api_url=api_url)
    assert done.returncode == 0, done.stderr[-2000:]
    said = " ".join((done.stdout + done.stderr).split())
    assert "fewer than audit.min_canary_images 400" in said
    assert "+-0.05 with 385" in said
