"""The verdict counts what the truth says, and nothing else."""

import io
from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pytest
from rich.console import Console

from flows.quickstart.scenes import PLURALS, Scene
from flows.quickstart.verdict import (
    Rate,
    captions_true,
    compare_arms,
    judge_round,
    render_verdict,
)
from flows.quickstart.world import World, WorldConfig, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(num_web=60, num_human=4, num_heldout=4)
    return build_world(config, tmp_path_factory.mktemp("verdict") / "world")


@pytest.fixture
def lake_views(world: World) -> Iterator[duckdb.DuckDBPyConnection]:
    """The views of a lake whose filter drops every wrong web text but the one-word ones."""
    connection = duckdb.connect()
    pairs, captions, decisions = [], [], []
    for row in world.truth().to_pylist():
        if row["pool"] != "web" or row["fault"]:
            continue
        image = {"image_id": row["image_id"]}
        names = {key: row[key] for key in ("url", "source_name")}
        pairs.append({**image, **names, "pool": "web", "status": "ok"})
        lies = "red rings on red"  # never true: the ground differs from every thing
        for source, text, round in (("web", row["alt_text"], 0), ("synthetic", lies, 1)):
            ids = {**image, "caption_id": f"{source}-{row['image_id']}"}
            captions.append({**ids, "caption": text, "status": "ok", "round": round})
            kept = source == "web" and row["noise_kind"] in ("", "one_word")
            fate = {
                "source": source,
                "kept": kept,
                "round": 1,
                "policy": "blip",
                "generation": "blip",
            }
            decisions.append({**ids, **fate})
    for name, rows in (("pairs", pairs), ("captions", captions), ("decisions", decisions)):
        connection.register(name, pa.Table.from_pylist(rows))
    yield connection
    connection.close()


def test_judge_round_counts_by_truth_source_and_kind(
    lake_views: duckdb.DuckDBPyConnection, world: World
) -> None:
    verdict = judge_round(lake_views, world, round=1)
    kinds = {group.group: group.drop_recall.value for group in verdict.by_noise}
    assert kinds == {"boilerplate": 1.0, "one_word": 0.0, "other_picture": 1.0}
    assert verdict.web.num_texts == 60
    assert verdict.web.drop_precision.value == 1.0
    assert verdict.web.true_dropped == 0
    assert verdict.web.wrong_kept == next(
        group.num_texts for group in verdict.by_noise if group.group == "one_word"
    )
    assert [group.group for group in verdict.by_source] == ["blog", "museum", "shop"]
    assert sum(group.num_texts for group in verdict.by_source) == 60
    assert verdict.synthetic.true_before.value == 0.0
    assert verdict.synthetic.true_after.n == 0


def test_judge_round_sees_no_texts_of_another_round(
    lake_views: duckdb.DuckDBPyConnection, world: World
) -> None:
    assert judge_round(lake_views, world, round=2).web.num_texts == 0


def test_captions_true_says_which_captions_show_the_picture(world: World) -> None:
    scenes = world.scenes()
    first, second = list(scenes)[:2]
    said = [(first, _sentence(scenes[first])), (second, "a photo of nothing")]
    assert captions_true(said, world) == [True, False]


def test_compare_arms_pairs_the_metrics_of_two_models() -> None:
    rows = [
        ("m1", "heldout", "mean_recall", 0.2),
        ("m2", "heldout", "mean_recall", 0.5),
        ("m2", "heldout", "cider", 1.1),
        ("m2", "train", "loss_lm", 3.0),
        ("m3", "heldout", "mean_recall", 0.9),
    ]
    names = ["model_id", "dataset", "metric", "value"]
    metrics = [dict(zip(names, row, strict=True)) for row in rows]
    with duckdb.connect() as connection:
        connection.register("metrics", pa.Table.from_pylist(metrics))
        recall, cider = compare_arms(connection, "m1", "m2")
    assert (recall.metric, recall.raw, recall.clean) == ("mean_recall", 0.2, 0.5)
    assert recall.gain == pytest.approx(0.3)
    assert (cider.raw, cider.clean, cider.gain) == (None, 1.1, None)


def test_render_verdict_prints_the_figures(
    lake_views: duckdb.DuckDBPyConnection, world: World
) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    verdict = judge_round(lake_views, world, round=1)
    console.print(render_verdict(verdict))
    printed = console.export_text()
    assert f"{verdict.web.drop_recall.value:.1%} of the wrong web texts" in printed
    assert "one word swapped" in printed


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763), (0, 0, 0.0, 1.0)]
)
def test_rate_interval_is_wilsons(hits: int, n: int, low: float, high: float) -> None:
    assert Rate(hits=hits, n=n).interval() == pytest.approx((low, high), abs=1e-3)


def _sentence(scene: Scene) -> str:
    (color, shape), *_ = scene.things
    return f"many {color} {PLURALS[shape]} on {scene.ground}"
