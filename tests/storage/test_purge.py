"""An image is taken out of every place of a lake, everything else stays, and the lake goes on as if it had not been there."""

import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from purge_world import (
    BASIS,
    CANARY,
    HELDOUT,
    OTHER_CANARY,
    SHARDS,
    alt,
    around,
    counts,
    human,
    image_id,
    picture,
    said_of,
    synthetic,
    url,
    write_lake,
)

from storage import decide, layout, query, read_image, registry
from storage.errors import ConfigError, LakeBusy, PurgeNotClean, PurgeUnfinished
from storage.exports import Options, export
from storage.fs import Root
from storage.intake.records import finished_intake
from storage.lake import Lake
from storage.purge import (
    Request,
    asked_host,
    asked_image,
    asked_url,
    find,
    images_of,
    purge,
    read_list,
    resume,
)
from storage.purge import run as purge_run
from storage.repair import find_damage
from storage.schemas import TABLES
from storage.shards import iter_shard
from storage.tables import committed_part, iter_part, list_parts, part_manifest, read_part
from storage.trainset import images_in
from storage.why import why

WHY = "the photographer asked, mail of 2026-11-20"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return write_lake(str(tmp_path_factory.mktemp("made") / "lake"))


@pytest.fixture
def local(made: Lake, tmp_path: Path) -> Lake:
    shutil.copytree(made.uri, tmp_path / "lake")
    return Lake.open(str(tmp_path / "lake"))


@pytest.fixture(params=["local", "memory"])
def lake(request: pytest.FixtureRequest, tmp_path: Path, local: Lake) -> Lake:
    return local if request.param == "local" else write_lake(f"memory://{tmp_path.name}/lake")


def asked(*things: Any, because: str = WHY) -> Request:
    return Request(asked=things, because=because)


def pair_of(lake: Lake, key_of: str) -> dict[str, Any]:
    rows = query(lake, "SELECT * FROM pairs WHERE url = $url AND pool = 'web'", {"url": key_of})
    return rows.to_pylist()[0]


def stored_bytes(lake: Lake) -> dict[str, bytes]:
    return {name: lake.root.read_bytes(layout.shard(name)) for name in SHARDS}


def test_purged_image_is_nowhere_any_more_and_its_row_says_why(lake: Lake) -> None:
    gone, text, other = image_id(0), alt(0), synthetic(0)
    before, row = counts(lake), pair_of(lake, url(0))
    bytes_before = stored_bytes(lake)
    assert said_of(lake, gone)
    assert said_of(lake, text)
    done = purge(lake, asked(asked_image(gone)), around())

    assert done.proof.is_clean
    for needle in (text, other):
        assert said_of(lake, needle) == []
    allowed = {"pairs", "purged"}
    record = layout.purge_record(done.plan.purge_id)
    for place in said_of(lake, gone):
        assert place == record or place.split("/")[1] in allowed, place

    after = pair_of(lake, url(0))
    kept = ("key", "pool", "row", "source_name", "url", "attempts", "image_id", "fetched_at")
    assert {name: after[name] for name in kept} == {name: row[name] for name in kept}
    assert (after["status"], after["reason"]) == ("purged", WHY)
    left = set(after) - {*kept, "status", "reason"}
    assert {after[name] for name in left} == {None}

    now = counts(lake)
    expected = {"captions": 2, "scores": 2, "decisions": 2, "judgements": 1}
    assert {t: before[t] - now[t] for t in before} == {t: expected.get(t, 0) for t in before}
    assert now["purged"] == 1

    # The tar: zeros where the image and its text were, and not one other byte changed.
    image = slice(row["offset"], row["offset"] + row["size"])
    shard = stored_bytes(lake)[row["shard"]]
    assert bytes_before[row["shard"]][image] == picture(0)
    assert shard[image] == bytes(row["size"])
    assert text.encode() not in shard
    changed = [
        i for i, (a, b) in enumerate(zip(shard, bytes_before[row["shard"]], strict=True)) if a != b
    ]
    assert changed[-1] < row["offset"] + row["size"] + 2048, "only the image and its sidecar"
    assert [sample.image for sample in iter_shard(lake, SHARDS[0])] == [
        picture(n) for n in range(1, 6)
    ]
    for number in range(1, 6):
        other_row = pair_of(lake, url(number))
        place = (other_row["shard"], other_row["offset"], other_row["size"])
        assert read_image(lake, *place) == picture(number)
    assert list(find_damage(lake)) == []


def test_manifests_count_what_came_in_and_what_was_purged(local: Lake) -> None:
    purge(local, asked(asked_image(image_id(0))), around())
    for table, round, reasons in (
        ("pairs", None, {"duplicate_image": 1, "duplicate_url": 1, "http_4xx": 1, "purged": 1}),
        ("captions", 0, {"purged": 1}),
        ("scores", 1, {"purged": 2}),
    ):
        part = committed_part(local, table, SHARDS[0], round=round)
        manifest = part_manifest(local, part)
        assert dict(manifest.reasons) == reasons
        assert manifest.num_in == manifest.num_ok + manifest.num_not_ok
        assert manifest.purged["rows"] == reasons["purged"]
    (decisions,) = list_parts(local, "decisions")
    manifest = part_manifest(local, decisions)
    assert manifest.reasons["purged"] == 2
    assert manifest.num_rows + 2 == manifest.num_in


def test_stages_find_their_parts_again_after_a_purge(lake: Lake) -> None:
    before = decide(lake, 1)
    record = finished_intake(lake, 1, "web-00", BASIS, "error")
    purge(lake, asked(asked_image(image_id(0))), around())
    stamps = {path: lake.root.fs.modified(lake.root.path(path)) for path in _parts(lake)}
    again = decide(lake, 1)
    assert again.fingerprint != before.fingerprint
    assert again.num_rows == before.num_rows - 2
    assert part_manifest(lake, again).purged["was"] == [before.fingerprint]
    after = finished_intake(lake, 1, "web-00", BASIS, "error")
    assert after is not None, "the intake is finished, and is not run again"
    assert [part.name for part in after.parts] == [part.name for part in record.parts]
    assert {path: lake.root.fs.modified(lake.root.path(path)) for path in _parts(lake)} == stamps


def _parts(lake: Lake) -> list[str]:
    return lake.root.list_recursive(layout.TABLES)


def test_training_sets_lose_the_rows_and_models_say_what_they_were_trained_on(local: Lake) -> None:
    med, captioner = registry.find(local, "med", 0), registry.find(local, "captioner", 1)
    trained_on = registry.lineage_of(local, med.model_id)["trained_on"]
    rows = images_in(local, trained_on, _ids(0, 1, 2))
    assert set(rows) == {image_id(n) for n in (0, 1, 2)}
    done = purge(local, asked(asked_image(image_id(0)), asked_image(image_id(1))), around())
    assert [model.model_id for model in done.plan.trained] == [med.model_id]
    assert not local.root.exists(layout.trainset(trained_on))

    told = query(
        local, "SELECT model_id, purged_images, purged_in_ancestry FROM lineage"
    ).to_pylist()
    by_model = {row["model_id"]: (row["purged_images"], row["purged_in_ancestry"]) for row in told}
    assert by_model == {med.model_id: (2, 2), captioner.model_id: (0, 2)}
    (row,) = query(local, "SELECT purge_id, because, images, models FROM purges").to_pylist()
    assert row == {
        "purge_id": done.plan.purge_id,
        "because": WHY,
        "images": 2,
        "models": [med.model_id],
    }
    # The lineage of the images that stay is still known, through the set that took the other's place.
    (text,) = [t for t in why(local, url(2))["images"][0]["texts"] if t["source"] == "web"]
    assert [model["model_id"] for model in text["trained"]] == [med.model_id]
    # And the second purge of a set finds the model too.
    second = purge(local, asked(asked_image(image_id(2))), around())
    assert [model.model_id for model in second.plan.trained] == [med.model_id]


def _ids(*numbers: int) -> Any:
    import pyarrow as pa

    return pa.array([image_id(number) for number in numbers])


def test_the_same_query_gives_the_training_set_that_a_purge_left(local: Lake) -> None:
    from storage import build_trainset

    sql = "SELECT image_id, caption, source FROM raw"
    built = build_trainset(local, sql, name="again")
    purge(local, asked(asked_image(image_id(0))), around())
    record = json.loads(local.root.read_bytes(layout.trainset_successor(built.fingerprint)))
    after = build_trainset(local, sql, name="again")
    assert after.fingerprint == record["successor"]
    assert after.num_rows == built.num_rows - 1
    part = committed_part(local, "metrics", "train-web", round=1)
    assert part_manifest(local, part).inputs == (after.fingerprint,)


def test_every_copy_of_a_picture_and_every_row_of_its_addresses_goes(local: Lake) -> None:
    found = find(local, asked(asked_url("http://mirror.test/2.png")))
    rows = {(row["url"], row["asked"]) for row in found.rows.to_pylist()}
    assert rows == {
        ("http://mirror.test/2.png", "url mirror.test/2.png"),
        (url(2), "the same picture"),
    }
    by_id = find(local, asked(asked_image(image_id(1))))
    assert {(row["url"], row["status"]) for row in by_id.rows.to_pylist()} == {
        (url(1), "ok"),
        (url(1), "duplicate_url"),
    }
    held_out = purge(local, asked(asked_image(image_id(4))), around())
    assert {row["pool"] for row in next(images_of(held_out.rows))["rows"]} == {"web", "heldout"}
    assert said_of(local, human(4)[0]) == []
    assert said_of(local, alt(4)) == []


def test_purged_canary_leaves_no_text_beside_the_other(local: Lake) -> None:
    planted = human(CANARY)[1]
    assert any("canaries" in place for place in said_of(local, planted))
    done = purge(local, asked(asked_image(image_id(CANARY))), around())
    for text in human(CANARY):
        assert said_of(local, text) == []
    rows = query(local, "SELECT image_id, kind FROM canaries").to_pylist()
    assert rows == [{"image_id": image_id(OTHER_CANARY), "kind": "true"}]
    assert done.plan.tables["canaries"] == 3
    drawn = query(local, "SELECT image_id FROM canary_draws").to_pylist()
    assert image_id(CANARY) not in {row["image_id"] for row in drawn}


def test_purged_heldout_image_has_no_rank_and_is_never_evaluated_on(local: Lake) -> None:
    purge(local, asked(asked_image(image_id(HELDOUT[0]))), around())
    assert query(local, "SELECT image_id FROM ranks").column(0).to_pylist() == [
        image_id(HELDOUT[1])
    ]
    left = query(local, "SELECT DISTINCT image_id FROM heldout").column(0).to_pylist()
    assert left == [image_id(HELDOUT[1])]


def test_host_takes_its_subdomains_and_no_other(local: Lake) -> None:
    done = purge(local, asked(asked_host("Museum.TEST.")), around())
    named = {row["url"] for image in images_of(done.rows) for row in image["rows"]}
    assert named == {
        *(url(number) for number in (0, 2, 4, 6, 8)),
        "HTTP://MUSEUM.test:80/dead.png",
        "http://mirror.test/2.png",
        "4.png",
    }, "its own, the dead one, and copies of its pictures"
    statuses = query(local, "SELECT status, url FROM pairs WHERE pool = 'web'").to_pylist()
    assert {row["url"] for row in statuses if row["status"] == "ok"} == {
        url(number) for number in (1, 3, 5, 7, 9)
    }


def test_dry_run_says_what_would_go_and_touches_nothing(local: Lake, tmp_path: Path) -> None:
    def everything() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    before = everything()
    reader = Lake.open(local.uri, read_only=True)
    plan = find(reader, asked(asked_host("museum.test")), around().content_changes).plan
    assert everything() == before
    assert (plan.num_rows, plan.num_images) == (8, 5)
    assert plan.shards == {"heldout-people-00000": 1, SHARDS[0]: 3, SHARDS[1]: 2}
    assert plan.reports == (1,)
    assert [model.images for model in plan.trained] == [4], "picture 4 is held out"
    assert any(name.startswith("train") for name in plan.scratch)
    done = purge(local, asked(asked_host("museum.test")), around())
    assert done.plan.tables == plan.tables
    assert done.plan.content == plan.content


def test_unfinished_work_and_the_page_go(local: Lake) -> None:
    page = local.root.read_bytes(layout.report(1))
    assert alt(0).encode() in page
    purge(local, asked(asked_image(image_id(0))), around())
    page = local.root.read_bytes(layout.report(1))
    assert alt(0).encode() not in page
    assert alt(1).encode() in page
    assert not list(local.scratch("train").rglob("*"))
    done = purge(local, asked(asked_image(image_id(1))))
    assert done.reports_removed == (1,), "nobody to write it anew"
    assert not local.root.exists(layout.report(1))


def test_purge_again_changes_nothing_and_proves_it_again(lake: Lake) -> None:
    first = purge(lake, asked(asked_url(url(0))), around())
    stamps = {path: lake.root.fs.modified(lake.root.path(path)) for path in _parts(lake)}
    again = purge(lake, asked(asked_url(url(0)), because="asked twice"), around())
    assert again.plan is None
    assert again.earlier == (first.plan.purge_id,)
    assert again.proof.is_clean
    assert again.proof.places == first.proof.places == 2
    assert {path: lake.root.fs.modified(lake.root.path(path)) for path in _parts(lake)} == stamps


def test_what_matches_nothing_is_an_error_unless_it_is_in_a_list(
    local: Lake, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"nothing in .* is url nowhere.test/1.png"):
        purge(local, asked(asked_url(url(0)), asked_url("http://nowhere.test/1.png")))
    assert pair_of(local, url(0))["status"] == "ok", "nothing was done"
    path = tmp_path / "list.txt"
    path.write_text(
        f"# who asked: a photographer\n\n{url(0)}\n  {image_id(1)}  \nhttp://nowhere.test/1.png\n"
        "no host at all\nhttp://[broken\nmirror.test\n"
    )
    request = read_list(path, WHY)
    assert [str(each) for each in request.asked] == [
        "url img.museum.test/0.png",
        f"image {image_id(1)}",
        "url nowhere.test/1.png",
        "host mirror.test",
    ]
    assert [line.partition(":")[0] for line in request.bad_lines] == ["line 6", "line 7"]
    done = purge(local, request, around())
    assert done.plan.unmatched == ("url nowhere.test/1.png",)
    assert done.plan.num_images == 3
    path.write_text("http://nowhere.test/1.png\n")
    with pytest.raises(ConfigError, match="nothing in"):
        purge(local, read_list(path, WHY))
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="names nothing to purge"):
        read_list(path, WHY)


def test_purge_needs_a_reason_and_the_lake_to_itself(local: Lake) -> None:
    with pytest.raises(ConfigError, match="needs a reason"):
        asked(asked_image(image_id(0)), because=" ")
    with local.lock("bootstrap"), pytest.raises(LakeBusy, match="bootstrap"):
        purge(Lake.open(local.uri), asked(asked_image(image_id(0))))


def test_a_purge_of_many_writes_each_file_once(
    local: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: Counter[str] = Counter()
    staged = Root.staged

    @contextmanager
    def counted(self: Root, rel: str) -> Any:
        written[rel] += 1
        with staged(self, rel) as tmp:
            yield tmp

    monkeypatch.setattr(Root, "staged", counted)
    everything = [asked_image(image_id(number)) for number in range(NUM_ALL)]
    done = purge(local, asked(*everything), around())
    assert done.plan.num_images == NUM_ALL
    data = {rel: n for rel, n in written.items() if rel.endswith((".parquet", ".tar", ".arrow"))}
    assert {layout.shard(name) for name in SHARDS} <= set(data)
    assert set(data.values()) == {1}


NUM_ALL = 10


def test_readers_never_see_an_error_nor_a_part_missing(
    local: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every move of the purge is slowed down, so that readers fall between any two of them."""
    publish = Root.staged

    @contextmanager
    def slowly(self: Root, rel: str) -> Any:
        with publish(self, rel) as tmp:
            yield tmp
        time.sleep(0.02)

    monkeypatch.setattr(Root, "staged", slowly)
    seen: list[tuple[int, int, int]] = []
    stop = threading.Event()
    sql = "SELECT (SELECT count(*) FROM pairs), (SELECT count(*) FROM captions), count(*) FROM verdicts"

    def read() -> None:
        reader = Lake.open(local.uri, read_only=True)
        while not stop.is_set():
            seen.append(tuple(query(reader, sql).to_pylist()[0].values()))
            for table in TABLES:
                for part in list_parts(reader, table, check=True):
                    read_part(reader, part)
                    list(iter_part(reader, part))

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        while not seen and not any(reader.done() for reader in readers):
            time.sleep(0.01)
        try:
            purge(local, asked(asked_host("museum.test")), around())
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert len(seen) > 5
    assert {pairs for pairs, _, _ in seen} == {18}
    captions = [n for _, n, _ in seen]
    assert min(captions) >= counts(local)["captions"]
    assert set(captions) != {captions[0]}, "the purge was seen while it went on"


def test_unfinished_purge_keeps_others_from_writing_until_it_is_finished(
    local: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*about: object) -> int:
        raise OSError("the disk is away")

    monkeypatch.setattr(purge_run, "blank", broken)
    with pytest.raises(OSError, match="the disk is away"):
        purge(local, asked(asked_image(image_id(0))), around())
    with pytest.raises(PurgeUnfinished, match="bootstrap purge --resume"), local.lock("bootstrap"):
        pass
    assert query(local, "SELECT count(*) AS n FROM pairs").to_pylist() == [{"n": 18}]
    monkeypatch.undo()
    done = resume(local, around())
    assert done.proof.is_clean
    assert resume(local, around()) is None
    with local.lock("bootstrap"):
        assert said_of(local, alt(0)) == []


def test_proof_finds_what_is_left(local: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge_run, "blank", lambda *about: 0)
    local.root.write_bytes("rounds/0001/notes.json", json.dumps({"seen": alt(0)}).encode())
    with pytest.raises(PurgeNotClean, match=r"not zeros") as err:
        purge(local, asked(asked_image(image_id(0))), around())
    assert "notes.json says" in str(err.value)
    assert local.root.exists(layout.PURGE_BEGUN)
    monkeypatch.undo()
    local.root.remove("rounds/0001/notes.json")
    assert resume(local, around()).proof.is_clean


def test_export_after_a_purge_says_that_the_folder_is_stale(local: Lake, tmp_path: Path) -> None:
    from storage.errors import StaleOutput

    options = Options(format="ids")
    target = str(tmp_path / "out")
    before = export(local, target, options)
    purge(local, asked(asked_image(image_id(0))), around())
    with pytest.raises(StaleOutput, match="holds another export"):
        export(local, target, options)
    after = export(local, target, options, on_stale="rebuild")
    assert after.num_images == before.num_images - 1


def test_damaged_shard_loses_the_picture_all_the_same(local: Lake) -> None:
    row = pair_of(local, url(3))
    path = local.root.local_path(layout.shard(SHARDS[0]))
    content = bytearray(path.read_bytes())
    content[row["offset"] - 1024 : row["offset"] - 1000] = b"\xff" * 24  # within the member before
    content[pair_of(local, url(1))["offset"] - 512 + 148] ^= 0xFF  # a header's checksum
    path.write_bytes(content)
    done = purge(local, asked(asked_image(image_id(3))), around())
    assert done.proof.is_clean
    assert alt(3).encode() not in path.read_bytes()
    gone = purge_of_lost_shard(local)
    assert gone.proof.shards_gone == [SHARDS[1]]


def purge_of_lost_shard(lake: Lake) -> Any:
    lake.root.remove(layout.shard(SHARDS[1]))
    return purge(lake, asked(asked_image(image_id(7))), around())


def test_look_alikes_are_named_and_stay(local: Lake) -> None:
    part = committed_part(local, "pairs", SHARDS[0])
    table = read_part(local, part)
    like = table.to_pylist()
    like[5]["phash"] = like[0]["phash"]
    from storage.tables import commit_part, rows_table

    commit_part(
        local,
        "pairs",
        SHARDS[0],
        rows_table("pairs", like),
        basis=part_manifest(local, part).basis,
    )
    plan = find(local, asked(asked_image(image_id(0)))).plan
    assert plan.look_alikes == ((image_id(5), url(5)),)
