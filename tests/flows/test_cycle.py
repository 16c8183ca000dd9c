"""The whole cycle: URL list to report, again without work, then a second round."""

import dataclasses
import json
import shutil
from pathlib import Path

from cycle import COMMITTED, FinishedCycle, bootstrap, copied, stamps, write_settings

from flows.settings import parse_settings
from storage import Lake, layout, query, registry, rounds


def _rows(lake: Lake, sql: str) -> list[dict]:
    return query(lake, sql).to_pylist()


def test_cycle_gives_every_row_one_outcome(finished: FinishedCycle) -> None:
    lake = Lake.open(str(finished.lake), read_only=True)
    listed = _rows(
        lake, "SELECT count(*) AS n, count(DISTINCT row) AS rows FROM pairs WHERE pool = 'web'"
    )[0]
    truth = len(_truth(finished))
    assert listed == {"n": truth, "rows": truth}
    undecided = _rows(
        lake,
        """
        SELECT c.caption_id FROM captions c LEFT JOIN decisions d USING (caption_id)
        WHERE c.source IN ('web', 'synthetic') AND c.status = 'ok' AND d.caption_id IS NULL""",
    )
    assert undecided == []
    twice = _rows(lake, "SELECT caption_id FROM decisions GROUP BY ALL HAVING count(*) > 1")
    assert twice == []


def test_cycle_records_where_models_come_from(finished: FinishedCycle) -> None:
    lake = Lake.open(str(finished.lake), read_only=True)
    models = {(row["role"], row["round"]): row for row in _rows(lake, "SELECT * FROM models")}
    assert set(models) == {("med", 0), ("captioner", 1), ("filter", 1), ("med", 1)}
    first = models["med", 0]["model_id"]
    assert models["captioner", 1]["parent_id"] == models["filter", 1]["parent_id"] == first
    assert models["med", 1]["parent_id"] is None, "the retrained model starts from scratch"
    made_by = _rows(lake, "SELECT DISTINCT model_id FROM captions WHERE source = 'synthetic'")
    assert made_by == [{"model_id": models["captioner", 1]["model_id"]}]


def test_cycle_notes_how_fast_each_training_went(finished: FinishedCycle) -> None:
    lake = Lake.open(str(finished.lake), read_only=True)
    (row,) = _rows(lake, "SELECT speed FROM rounds")
    speed = json.loads(row["speed"])
    for training in ("pretrain", "captioner", "filter", "retrain"):
        figures = speed[training]
        assert set(figures) == {"images_per_s", "memory_gib"}, "no peak is known of a CPU"
        assert all(value > 0 for value in figures.values())


def test_cycle_stops_its_captioner_by_pairs_held_back(finished: FinishedCycle) -> None:
    lake = Lake.open(str(finished.lake), read_only=True)
    curve = _rows(
        lake, "SELECT dataset, n, value FROM metrics WHERE metric = 'dev_loss' ORDER BY value"
    )
    assert {row["dataset"] for row in curve} == {"train-captioner"}
    assert {row["n"] for row in curve} <= {4, 8, 9}
    assert _rows(lake, "SELECT value FROM metrics WHERE metric = 'best_step'") == [
        {"value": curve[0]["n"]}
    ]


def test_cycle_measures_both_models_and_says_why(finished: FinishedCycle) -> None:
    lake = Lake.open(str(finished.lake), read_only=True)
    measured = _rows(
        lake,
        """
        SELECT metric, count(DISTINCT model_id) AS models, min(n) AS n FROM metrics
        WHERE dataset = 'heldout' GROUP BY metric""",
    )
    by_name = {row["metric"]: row for row in measured}
    for metric in ("i2t_r1", "t2i_r10", "mean_recall", "itm_auc_random", "cider", "caption_truth"):
        assert by_name[metric]["models"] == 2
        assert by_name[metric]["n"] > 0
    record = _rows(lake, "SELECT status, why, seconds FROM rounds")[0]
    assert record["status"] == "promoted"
    assert "mean_recall" in record["why"]
    assert {"ingest", "pretrain", "caption", "score", "retrain"} <= set(
        json.loads(record["seconds"])
    )
    assert "promoted" in finished.output


def test_cycle_writes_a_report_and_a_catalog(finished: FinishedCycle) -> None:
    page = (finished.lake / "reports" / "round=0001" / "index.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "").split("<body")[0]
    assert (finished.lake / "catalog.duckdb").is_file()


def test_same_command_again_rewrites_nothing_then_a_second_round_follows(
    finished: FinishedCycle, api_url: str, tmp_path: Path
) -> None:
    cycle = copied(finished, tmp_path)
    before = stamps(cycle.lake, *COMMITTED)
    again = bootstrap("run", "--config", str(cycle.config), cwd=cycle.folder, api_url=api_url)
    assert again.returncode == 0, again.stderr[-2000:]
    assert stamps(cycle.lake, *COMMITTED) == before

    answer = bootstrap(
        "sql", "SELECT count(*) AS n FROM decisions", "--format", "csv", cwd=cycle.folder
    )
    assert answer.stdout.split() == ["n", str(_decisions(cycle))]

    second = bootstrap(
        "next-round", "--config", str(cycle.config), cwd=cycle.folder, api_url=api_url
    )
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    after = stamps(cycle.lake, *COMMITTED)
    assert {path: after[path] for path in before if "champion" not in path} == {
        path: stamp for path, stamp in before.items() if "champion" not in path
    }
    lake = Lake.open(str(cycle.lake), read_only=True)
    rounds = _rows(lake, "SELECT round, status, champion_before FROM rounds ORDER BY round")
    assert [row["round"] for row in rounds] == [1, 2]
    assert (
        rounds[1]["champion_before"]
        == _rows(lake, "SELECT model_id FROM models WHERE role = 'med' AND round = 1")[0][
            "model_id"
        ]
    )
    assert _rows(lake, "SELECT count(*) AS n FROM scores WHERE round = 2")[0]["n"] > 0


def test_round_with_nothing_new_is_not_run_and_leaves_nothing(
    finished: FinishedCycle, api_url: str, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(finished.lake, lake)
    settings = json.loads(json.dumps(finished.settings))
    settings["machine"]["lake"] = str(lake)
    settings["gate"] = {"max_recall_drop": 0.0}
    opened = Lake.open(str(lake))
    last = rounds.latest_round(opened)
    assert last is not None
    first = registry.find(opened, "med", 0)
    assert first is not None
    # As if the last round had been refused: the champion is the one that it started from.
    before = last.champion_before or first.model_id
    settled = parse_settings(settings).as_basis()
    rounds.write_round(
        opened,
        dataclasses.replace(last, settings=settled, status="refused", champion_after=before),
    )
    (lake / layout.round_settings(last.round)).write_text(json.dumps(settled))
    registry.promote(opened, before, last.round, "refused")
    config = write_settings(tmp_path / "tiny.yaml", settings)
    idle = bootstrap("next-round", "--config", str(config), cwd=tmp_path, api_url=api_url)
    assert idle.returncode == 0, idle.stdout[-1500:] + idle.stderr[-1500:]
    assert "nothing new" in idle.stdout
    assert not (lake / layout.round_dir(last.round + 1)).exists()
    assert rounds.latest_round(opened).round == last.round


def _truth(finished: FinishedCycle) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(finished.settings["world"]["folder"] + "/web/urls.parquet").to_pylist()


def _decisions(finished: FinishedCycle) -> int:
    lake = Lake.open(str(finished.lake), read_only=True)
    return int(_rows(lake, "SELECT count(*) AS n FROM decisions")[0]["n"])
