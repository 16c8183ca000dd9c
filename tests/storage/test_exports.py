"""Exports as their folder shows them: what is in, what is never in, what is refused, what is resumed."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import export_world
import fsspec
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from export_world import kept_texts, web_picture, write_lake

from storage import ids, query
from storage.errors import ConfigError, CorruptData, EmptyInput, LakeBusy, StaleOutput
from storage.exports import Options, export
from storage.exports.format import DamagedExport
from storage.exports.target import Target
from storage.generations import active_generation
from storage.lake import Lake
from storage.shards import iter_shard

FORMATS = ("webdataset", "hf-parquet", "blip-json", "coco-json", "ids")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """The lake, for tests that only read it."""
    return write_lake(str(tmp_path_factory.mktemp("exports") / "lake"))


@pytest.fixture
def own(shared: Lake, tmp_path: Path) -> Lake:
    """A copy in `tmp_path/lake`, for tests that change it."""
    shutil.copytree(shared.uri, tmp_path / "lake")
    return Lake.open(str(tmp_path / "lake"))


def wanted_ids(with_human: bool = False, threshold: float = 0.5) -> set[str]:
    return {ids.caption_id(*text) for text in kept_texts(threshold, with_human)}


def exported_ids(folder: Path) -> list[str]:
    """Caption ids of an export in the format ids."""
    return [
        caption_id
        for path in sorted((folder / "data").iterdir())
        for caption_id in pq.read_table(path)["caption_id"].to_pylist()
    ]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("with_human", [False, True])
def test_export_holds_what_the_policy_kept_and_nothing_that_must_stay(
    shared: Lake, tmp_path: Path, with_human: bool
) -> None:
    done = export(shared, str(tmp_path / "x"), Options(format="ids", with_human=with_human))
    found = exported_ids(tmp_path / "x")
    assert len(found) == len(set(found)) == done.num_texts
    assert set(found) == wanted_ids(with_human)
    rows = pq.read_table(tmp_path / "x" / "data").to_pylist()
    assert {row["source"] for row in rows} == {"web", "synthetic"} | (
        {"human"} if with_human else set()
    )
    for number in (export_world.HELDOUT, export_world.OPTED_OUT, export_world.DROPPED):
        assert ids.image_id(web_picture(number)) not in {row["image_id"] for row in rows}
    canary = ids.image_id(export_world.draw(40 + export_world.CANARY))
    assert canary not in {row["image_id"] for row in rows}


def test_export_of_what_counts_is_the_view_clean_less_who_has_opted_out(
    shared: Lake, tmp_path: Path
) -> None:
    export(shared, str(tmp_path / "x"), Options(format="ids"))
    clean = query(shared, "SELECT caption_id, image_id FROM clean").to_pylist()
    opted_out = ids.image_id(web_picture(export_world.OPTED_OUT))
    assert opted_out in {row["image_id"] for row in clean}
    left = {row["caption_id"] for row in clean if row["image_id"] != opted_out}
    assert set(exported_ids(tmp_path / "x")) == left


def test_export_of_ids_has_addresses_and_may_be_csv(shared: Lake, tmp_path: Path) -> None:
    export(shared, str(tmp_path / "csv"), Options(format="ids", csv=True))
    export(shared, str(tmp_path / "parquet"), Options(format="ids"))
    (of_csv,) = (tmp_path / "csv" / "data").iterdir()
    table = pc.read_csv(of_csv)
    assert table.column_names == ["caption_id", "image_id", "url", "source"]
    assert table.to_pylist() == pq.read_table(tmp_path / "parquet" / "data").to_pylist()
    urls = {row["image_id"]: row["url"] for row in table.to_pylist()}
    assert urls[ids.image_id(web_picture(2))] == "http://x/2.jpg"


@pytest.mark.parametrize("format", FORMATS)
def test_export_has_the_same_bytes_in_two_places_and_when_asked_again(
    shared: Lake, tmp_path: Path, format: str
) -> None:
    options = Options(format=format, shard_images=4, with_human=True)
    first = export(shared, str(tmp_path / "a"), options)
    export(shared, str(tmp_path / "b"), options)
    before = hashes(tmp_path / "a")
    assert before == hashes(tmp_path / "b")
    again = export(shared, str(tmp_path / "a"), options)
    assert (first.was_there, again.was_there) == (False, True)
    assert hashes(tmp_path / "a") == before
    assert not (tmp_path / "a" / "_export").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_export_counts_are_those_of_the_record(shared: Lake, tmp_path: Path, format: str) -> None:
    done = export(shared, str(tmp_path / "x"), Options(format=format, shard_images=3))
    record = json.loads((tmp_path / "x" / "export.json").read_text())
    assert (record["num_texts"], record["num_lost"]) == (len(kept_texts()), 0)
    assert record["num_images"] == done.num_images == len({image for image, _, _ in kept_texts()})
    assert record["basis"]["config"]["params"] == {"threshold": 0.5}
    listed = {file["path"]: file["sha256"] for file in record["files"]}
    found = hashes(tmp_path / "x")
    beside = {path for path in found if path.startswith("images/")} | {"export.json"}
    assert listed == {path: digest for path, digest in found.items() if path not in beside}


def test_export_to_memory_and_from_memory_is_as_on_a_disk(tmp_path: Path, shared: Lake) -> None:
    name = tmp_path.name
    remote = write_lake(f"memory://{name}-lake")
    for lake, uri in ((remote, str(tmp_path / "disk")), (shared, f"memory://{name}-target/deep")):
        export(lake, uri, Options(format="coco-json", shard_images=5))
    memory = fsspec.filesystem("memory")
    base = f"/{name}-target/deep"
    found = {
        path.removeprefix(f"{base}/"): hashlib.sha256(memory.cat_file(path)).hexdigest()
        for path in memory.find(base)
    }
    on_disk = hashes(tmp_path / "disk")
    for record in (found, on_disk):  # when it was decided is another day, perhaps
        del record["export.json"], record["README.md"], record["croissant.json"]
    assert found == on_disk


def test_export_follows_a_policy_by_name_and_leaves_the_active_one(
    own: Lake, tmp_path: Path
) -> None:
    active = active_generation(own, 1)
    mine = tmp_path / "long.sql"
    mine.write_text(
        "SELECT caption_id, length(caption) > 20 AS kept, 'length' AS reason FROM candidates"
    )
    done = export(own, str(tmp_path / "x"), Options(format="ids"), policy=str(mine), params={})
    everything = kept_texts(threshold=0.0)
    wanted = {ids.caption_id(*text) for text in everything if len(text[2]) > 20}
    assert set(exported_ids(tmp_path / "x")) == wanted
    assert done.policy == "long"
    assert active_generation(own, 1) == active
    again = export(own, str(tmp_path / "y"), Options(format="ids"), policy="long")
    assert again.generation == done.generation
    assert hashes(tmp_path / "x")["export.json"] == hashes(tmp_path / "y")["export.json"]


def test_export_decides_by_a_policy_that_has_not_decided_yet(own: Lake, tmp_path: Path) -> None:
    before = active_generation(own, 1)
    done = export(own, str(tmp_path / "x"), Options(format="ids"), policy="synthetic")
    assert (done.policy, active_generation(own, 1)) == ("synthetic", before)
    wanted = {ids.caption_id(*t) for t in kept_texts(threshold=0.0) if t[1] == "synthetic"}
    assert set(exported_ids(tmp_path / "x")) == wanted


def test_export_names_the_ways_in_which_a_policy_has_decided(own: Lake, tmp_path: Path) -> None:
    options = Options(format="ids")
    names = [
        export(own, str(tmp_path / str(t)), options, policy="itc", params={"threshold": t})
        for t in (0.5, 0.6)
    ]
    with pytest.raises(ConfigError, match="policy itc has decided round 1 in several ways: itc-"):
        export(own, str(tmp_path / "x"), options, policy="itc")
    done = export(own, str(tmp_path / "x"), options, policy=names[1].generation)
    assert (done.policy, done.generation) == ("itc", names[1].generation)
    assert set(exported_ids(tmp_path / "x")) == wanted_ids(threshold=0.85)
    again = export(own, str(tmp_path / "y"), options, params={"threshold": 0.6})
    assert again.policy == "blip", "parameters alone are those of the policy that counts"
    assert export(own, str(tmp_path / "z"), options, policy="blip").num_texts == len(kept_texts())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "no_such"}, "'no_such' is unknown; there are all, best_of, blip"),
        ({"policy": "blip", "params": {"treshold": 0.6}}, "treshold"),
        ({"round": 7}, "round 7 of lake .* has no decisions"),
        ({"round": 7, "policy": "blip"}, "round 7"),
    ],
)
def test_export_names_an_unknown_policy_parameter_or_round(
    own: Lake, tmp_path: Path, arguments: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(own, str(tmp_path / "x"), Options(format="ids"), **arguments)
    assert not (tmp_path / "x").exists()


def test_export_of_nothing_says_so(own: Lake, tmp_path: Path) -> None:
    none = tmp_path / "none.sql"
    none.write_text("SELECT caption_id, false AS kept, 'none' AS reason FROM candidates")
    with pytest.raises(EmptyInput, match="keeps no text that may leave the lake"):
        export(own, str(tmp_path / "x"), Options(format="ids"), policy=str(none), params={})
    empty = Lake.open(str(tmp_path / "empty"), create=True)
    with pytest.raises(EmptyInput, match="has no decisions"):
        export(empty, str(tmp_path / "x"), Options(format="ids"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "zip"}, "'zip' is unknown; there are blip-json, coco-json"),
        ({"format": "ids", "shard_images": 0}, "1 or more, got 0"),
        ({"format": "coco-json", "captions": "list"}, "coco-json has captions each, not list"),
        ({"format": "blip-json", "csv": True}, "csv is for the format ids"),
    ],
)
def test_options_name_what_cannot_be(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Options(**options)


def _foreign(folder: Path) -> None:
    folder.mkdir()
    for name in ("cat.jpg", "notes.txt"):
        (folder / name).write_text("mine")


def _file(folder: Path) -> None:
    folder.write_text("mine")


def _lake(folder: Path) -> None:
    Lake.open(str(folder), create=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_foreign, r"not an export: cat\.jpg, notes\.txt; name a folder that is new or empty"),
        (_file, "is a file; name a folder"),
        (_lake, r"not an export: lake\.json"),
    ],
)
def test_export_refuses_a_place_that_has_something_else(
    shared: Lake, tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "x")
    before = hashes(tmp_path)
    with pytest.raises(ConfigError, match=words):
        export(shared, str(tmp_path / "x"), Options(format="webdataset"))
    assert hashes(tmp_path) == before
    assert not (tmp_path / "x" / "_export").exists()


def test_export_refuses_another_export_and_replaces_it_when_told(
    shared: Lake, tmp_path: Path
) -> None:
    export(shared, str(tmp_path / "x"), Options(format="blip-json"))
    before = hashes(tmp_path / "x")
    with pytest.raises(StaleOutput, match=r"config\.format: blip-json -> webdataset"):
        export(shared, str(tmp_path / "x"), Options(format="webdataset"))
    assert hashes(tmp_path / "x") == before
    export(shared, str(tmp_path / "x"), Options(format="webdataset"), on_stale="rebuild")
    export(shared, str(tmp_path / "y"), Options(format="webdataset"))
    assert hashes(tmp_path / "x") == hashes(tmp_path / "y")


def test_export_refuses_what_was_put_beside_it_but_not_a_repository(
    shared: Lake, tmp_path: Path
) -> None:
    (tmp_path / "x" / ".git").mkdir(parents=True)
    (tmp_path / "x" / ".gitattributes").write_text("*.tar filter=lfs")
    export(shared, str(tmp_path / "x"), Options(format="webdataset"))
    (tmp_path / "x" / "data" / "extra.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"something else: data/extra\.tar"):
        export(shared, str(tmp_path / "x"), Options(format="webdataset"))


def test_two_exports_into_one_place_do_not_mix(shared: Lake, tmp_path: Path) -> None:
    target = Target(str(tmp_path / "x"), {}, {})
    with target.held(), pytest.raises(LakeBusy, match=r"target .* is in use by 'export'"):
        export(shared, str(tmp_path / "x"), Options(format="ids"))


@pytest.mark.parametrize("format", ["webdataset", "hf-parquet", "blip-json", "coco-json"])
def test_image_that_its_shard_has_lost_is_a_row_with_its_reason(
    own: Lake, tmp_path: Path, format: str
) -> None:
    export_world.damage(tmp_path / "lake", 2)
    done = export(own, str(tmp_path / "x"), Options(format=format, shard_images=4))
    (line,) = (tmp_path / "x" / "not_exported.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["image_id"] == ids.image_id(web_picture(2))
    assert (row["shard"], row["num_texts"]) == ("web-0001-00-00000", 3)
    assert "has not the image" in row["reason"]
    assert done.num_lost == 1
    assert done.num_texts == len(kept_texts()) - 3
    card = (tmp_path / "x/README.md").read_text()
    assert "1 images were kept but could not be read" in card
    assert "| exported | image could not be read | 3 |" in card


def test_lost_shard_costs_its_images_and_lost_shards_end_the_export(
    own: Lake, tmp_path: Path
) -> None:
    shards = sorted((tmp_path / "lake" / "shards").glob("web-*.tar"))
    content = [shard.read_bytes() for shard in shards]
    shards[0].unlink()
    done = export(own, str(tmp_path / "x"), Options(format="webdataset"))
    assert done.num_lost == 4
    shards[1].unlink()
    with pytest.raises(CorruptData, match=r"none of the 9 images can be read, .* is gone"):
        export(own, str(tmp_path / "y"), Options(format="webdataset"))
    for shard, data in zip(shards, content, strict=True):
        shard.write_bytes(data)
    assert export(own, str(tmp_path / "y"), Options(format="webdataset")).num_lost == 0


@pytest.mark.parametrize(
    ("format", "pattern"),
    [
        ("webdataset", "data/00001.tar"),
        ("hf-parquet", "data/train-00001-*.parquet"),
        ("blip-json", "images/*/*"),
        ("blip-json", "captions.json"),
        ("coco-json", "images/*/*"),
        ("ids", "data/*"),
        ("ids", "README.md"),
    ],
)
def test_damage_after_the_export_is_named_and_mended_by_the_same_command(
    shared: Lake, tmp_path: Path, format: str, pattern: str
) -> None:
    options = Options(format=format, shard_images=4)
    export(shared, str(tmp_path / "x"), options)
    before = hashes(tmp_path / "x")
    damaged = sorted((tmp_path / "x").glob(pattern))[-1]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-5] + b"?????")
    assert export(shared, str(tmp_path / "x"), options, verify=False).was_there, "nobody looked"
    with pytest.raises(DamagedExport, match=str(damaged.relative_to(tmp_path / "x"))):
        export(shared, str(tmp_path / "x"), options)
    assert not export(shared, str(tmp_path / "x"), options).was_there
    assert hashes(tmp_path / "x") == before
    damaged.unlink()
    with pytest.raises(DamagedExport, match="is gone"):
        export(shared, str(tmp_path / "x"), options)
    export(shared, str(tmp_path / "x"), options)
    assert hashes(tmp_path / "x") == before


@pytest.mark.parametrize("format", ["webdataset", "coco-json"])
def test_restored_image_comes_in_by_the_same_command(
    own: Lake, tmp_path: Path, format: str
) -> None:
    options = Options(format=format, shard_images=4)
    export(own, str(tmp_path / "whole"), options)
    (tar,) = (tmp_path / "lake" / "shards").glob("web-*-00000.tar")
    data = tar.read_bytes()
    export_world.damage(tmp_path / "lake", 2)
    export(own, str(tmp_path / "x"), options)
    assert export(own, str(tmp_path / "x"), options).num_lost == 1, "still lost"
    tar.write_bytes(data)
    assert export(own, str(tmp_path / "x"), options).num_lost == 0
    assert hashes(tmp_path / "x") == hashes(tmp_path / "whole")


def test_export_writes_nothing_into_the_lake(own: Lake, tmp_path: Path) -> None:
    before = hashes(tmp_path / "lake")
    export(own, str(tmp_path / "x"), Options(format="hf-parquet"))
    assert hashes(tmp_path / "lake") == before
    (sample, *_) = iter_shard(own, "web-0001-00-00000")
    assert sample.image == web_picture(0)
