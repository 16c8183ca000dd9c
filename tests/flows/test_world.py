"""The world is a pure function of its configuration, and its truth is true."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.quickstart.drawing import draw_jpeg
from flows.quickstart.scenes import (
    COLORS,
    FORMS,
    SHAPES,
    Scene,
    Vocabulary,
    caption_is_true,
    describe,
    parse,
    swap_one_word,
)
from flows.quickstart.world import (
    FAULTS,
    SOURCES,
    World,
    WorldConfig,
    WorldError,
    build_world,
    load_world,
)

SMALL = WorldConfig(num_web=300, num_human=12, num_heldout=10)
RICH = Vocabulary(colors=tuple(COLORS), shapes=SHAPES, patterns=("plain", "striped", "dotted"))
RED_STAR = Scene(things=(("red", "star"),), ground="blue")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(SMALL, tmp_path_factory.mktemp("world") / "world")


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("num_things", [1, 2])
def test_describe_is_true_and_a_swapped_word_is_not(form: int, num_things: int) -> None:
    rng = np.random.default_rng(form)
    for _ in range(50):
        scene = RICH.draw(rng, num_things)
        caption = describe(scene, form)
        assert caption_is_true(caption, scene), caption
        assert parse(caption) == scene
        assert not caption_is_true(describe(swap_one_word(scene, RICH, rng), form), scene)


@pytest.mark.parametrize(
    ("caption", "is_true"),
    [
        ("Red stars, on BLUE!", True),
        ("a picture of red stars on blue", True),
        ("blue stars on red", False),
        ("red stars", False),
        ("red stars on striped blue", False),
        ("red stars on blue blue", False),
        ("red stars on blue for sale", False),
        ("img 0042.jpg", False),
        ("", False),
    ],
)
def test_caption_is_true_wants_the_whole_sentence(caption: str, is_true: bool) -> None:
    assert caption_is_true(caption, RED_STAR) is is_true


def test_scene_survives_json() -> None:
    scene = Scene(things=(("red", "star"), ("pink", "moon")), ground="blue", pattern="dotted")
    assert Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize("shape", SHAPES)
def test_draw_jpeg_shows_both_colours_of_the_scene(shape: str) -> None:
    scene = Scene(things=(("red", shape),), ground="blue")
    data = draw_jpeg(scene, 64, np.random.default_rng(0))
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
    red, blue = pixels[..., 0] > pixels[..., 2] + 60, pixels[..., 2] > pixels[..., 0] + 60
    assert 0.1 < red.mean() < 10 / 16  # at most ten of sixteen cells
    assert blue.mean() > 6 / 16


def test_build_world_is_the_same_anywhere(world: World, tmp_path: Path) -> None:
    again = build_world(SMALL, tmp_path / "again")
    assert again.truth().equals(world.truth())
    assert again.url_list.read_bytes() == world.url_list.read_bytes()
    other = build_world(replace(SMALL, seed=1), tmp_path / "other")
    assert not other.truth().equals(world.truth())


def test_build_world_leaves_an_equal_world_alone(tmp_path: Path) -> None:
    config = WorldConfig(num_web=10, num_human=1, num_heldout=1)
    world = build_world(config, tmp_path / "world")
    world.url_list.write_bytes(b"touched")
    build_world(config, tmp_path / "world")
    assert world.url_list.read_bytes() == b"touched"
    build_world(replace(config, num_web=11), tmp_path / "world")
    assert world.url_list.read_bytes() != b"touched"
    assert load_world(tmp_path / "world").config.num_web == 11


def test_build_world_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("five years")
    with pytest.raises(WorldError, match=r"no world\.json"):
        build_world(SMALL, tmp_path)
    with pytest.raises(WorldError, match="build it"):
        load_world(tmp_path)


def test_url_list_has_the_noise_that_was_asked_for(world: World) -> None:
    rows = [row for row in world.truth().to_pylist() if row["pool"] == "web"]
    wrong = {
        source: np.mean([not r["alt_text_is_true"] for r in rows if r["source_name"] == source])
        for source in SOURCES
    }
    assert wrong == pytest.approx({"museum": 0.16, "blog": 0.4, "shop": 0.64}, abs=0.03)
    assert all((row["noise_kind"] == "") == row["alt_text_is_true"] for row in rows)
    listed = pq.read_table(world.url_list).to_pylist()
    assert [row["url"] for row in listed] == [row["url"] for row in rows]


def test_url_list_has_every_fault_and_all_good_pictures(world: World) -> None:
    rows = [row for row in world.truth().to_pylist() if row["pool"] == "web"]
    faults = Counter(row["fault"] for row in rows)
    assert faults.pop("") == SMALL.num_web
    assert set(faults) == set(FAULTS)
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row["url"], []).append(row["fault"])
    repeated = [found for found in places.values() if len(found) > 1]
    assert repeated == [["", "duplicate"]] * faults["duplicate"]


def test_no_two_pictures_are_equal(world: World) -> None:
    rows = [row for row in world.truth().to_pylist() if row["fault"] != "duplicate"]
    assert len({row["image_id"] for row in rows}) == len(rows)


def test_heldout_captions_are_true_and_scenes_differ(world: World) -> None:
    scenes = world.scenes()
    coco = json.loads(world.heldout_captions.read_text())
    truth = {
        row["image_file"].rsplit("/", 1)[1]: scenes[row["image_id"]]
        for row in world.truth().to_pylist()
        if row["pool"] == "heldout"
    }
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    assert all((world.heldout_images / file).is_file() for file in files.values())
    assert len(coco["annotations"]) == SMALL.num_heldout * SMALL.human_captions
    for caption in coco["annotations"]:
        assert caption_is_true(caption["caption"], truth[files[caption["image_id"]]])
    assert len(set(truth.values())) == SMALL.num_heldout


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_share", 0.9), ("num_colors", 40), ("image_size_px", 65), ("human_captions", 7)],
)
def test_world_config_refuses_a_value_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: {value}"):
        replace(SMALL, **{field: value})
