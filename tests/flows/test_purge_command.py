"""`bootstrap purge` on a finished cycle: what it says, what it proves, and that the cycle goes on as if it had been so always."""

import json

import pytest
from cycle import FinishedCycle, bootstrap, copied, stamps

from flows.cli import main
from storage import Lake, layout, list_parts, part_manifest, query

COMMITTED = ("tables", "shards", "models", "trainsets", "rounds", "champion.json")
WHY = "mail of the photographer, 2026-11-20"


@pytest.fixture(scope="module")
def purged(finished: FinishedCycle, tmp_path_factory: pytest.TempPathFactory) -> FinishedCycle:
    """A copy of the cycle's lake without a web image, one that people captioned, a canary and a held-out one."""
    folder = tmp_path_factory.mktemp("purged")
    cycle = copied(finished, folder)
    lake = Lake.open(str(cycle.lake), read_only=True)
    chosen = [_one(lake, sql) for sql in CHOSEN]
    lines = ["# what the photographer named", *chosen, "http://nowhere.test/1.jpg", "not a host"]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    (folder / "chosen.json").write_text(json.dumps(chosen))
    return cycle


@pytest.fixture
def after(purged: FinishedCycle) -> FinishedCycle:
    """The same once the purge is done, whoever of the tests here comes first in this process."""
    if not list_parts(Lake.open(str(purged.lake)), "purged"):
        listed = str(purged.lake.parent / "list.txt")
        assert main(("purge", "--file", listed, "--because", WHY, "--lake", str(purged.lake))) == 0
    return purged


CHOSEN = (
    "SELECT url FROM clean WHERE source = 'web' ORDER BY url LIMIT 1",
    "SELECT image_id FROM human ORDER BY image_id LIMIT 1",
    "SELECT image_id FROM canary_draws WHERE is_canary ORDER BY image_id LIMIT 1",
    "SELECT image_id FROM heldout ORDER BY image_id LIMIT 1",
    "SELECT image_id FROM judgements WHERE source = 'web' ORDER BY md5(caption_id) LIMIT 1",
)


def _one(lake: Lake, sql: str) -> str:
    return str(query(lake, sql).column(0)[0].as_py())


def test_purge_takes_images_out_and_a_run_again_does_nothing_anew(
    purged: FinishedCycle, api_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = purged.lake.parent
    listed, proof = str(folder / "list.txt"), str(folder / "proof.json")
    asked = ("purge", "--file", listed, "--because", WHY, "--lake", str(purged.lake))
    before = stamps(purged.lake, *COMMITTED, "reports", "work")
    assert main((*asked, "--dry-run")) == 0
    assert "nothing was touched" in capsys.readouterr().out
    assert stamps(purged.lake, *COMMITTED, "reports", "work") == before

    assert main((*asked, "--json", proof)) == 0
    out = capsys.readouterr().out
    assert "line 8: host 'not a host' is no host name" in out
    assert "not found  url nowhere.test/1.jpg" in out
    assert "trained    med" in out
    told = json.loads((folder / "proof.json").read_text())
    assert told["clean"] is True
    _nothing_is_left(purged, told)

    after = stamps(purged.lake, *COMMITTED)
    again = bootstrap("run", "--config", str(purged.config), cwd=folder, api_url=api_url)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert stamps(purged.lake, *COMMITTED) == after, "every stage found what it had made"


def _nothing_is_left(purged: FinishedCycle, told: dict) -> None:
    """Looked for by other means than the proof's own."""
    lake = Lake.open(str(purged.lake), read_only=True)
    url, *_ = json.loads((purged.lake.parent / "chosen.json").read_text())
    ids = {image["image_id"] for image in told["images"]} - {None}
    assert len(ids) == len(CHOSEN)
    wanted = {"ids": sorted(ids)}
    for table in (
        "captions",
        "scores",
        "decisions",
        "canaries",
        "canary_draws",
        "judgements",
        "ranks",
    ):
        sql = f"SELECT count(*) AS n FROM {table} WHERE list_contains($ids, image_id)"
        assert query(lake, sql, wanted).to_pylist() == [{"n": 0}], table
    rows = query(
        lake, "SELECT * FROM pairs WHERE list_contains($ids, image_id)", wanted
    ).to_pylist()
    assert {(row["status"], row["reason"], row["shard"], row["alt_text"]) for row in rows} == {
        ("purged", WHY, None, None)
    }
    for image in told["images"]:
        for place in image["places"]:
            data = lake.root.read_range(
                layout.shard(place["shard"]), place["offset"], place["size"]
            )
            assert data == bytes(place["size"])
    assert not any(url.encode() in path.read_bytes() for path in (purged.lake / "shards").iterdir())
    page = (purged.lake / "reports" / "round=0001" / "index.html").read_text()
    assert not any(f"<code>{image_id[:8]}</code>" in page for image_id in ids)
    figures = query(
        lake, "SELECT role, purged_images, purged_in_ancestry FROM lineage WHERE round < 2"
    )
    by_role = {row["role"]: row for row in figures.to_pylist()}
    assert by_role["med"]["purged_images"] > 0
    assert by_role["filter"]["purged_in_ancestry"] >= by_role["filter"]["purged_images"] > 0


def test_every_basis_that_changed_keeps_what_it_was_known_by(after: FinishedCycle) -> None:
    lake = Lake.open(str(after.lake), read_only=True)
    for table, stage in (
        ("captions", "caption"),
        ("scores", "score"),
        ("decisions", "decide"),
        ("canaries", "canaries"),
        ("canary_draws", "canary-draw"),
        ("judgements", "judge"),
        ("ranks", "evaluate"),
        ("metrics", "audit"),
        ("metrics", "train-pretrain"),
        ("metrics", "train-captioner"),
        ("metrics", "train-retrain"),
    ):
        manifests = [part_manifest(lake, part) for part in list_parts(lake, table, _round(stage))]
        touched = [m for m in manifests if m.stage == stage and m.purged.get("was")]
        assert touched, (table, stage)
        assert all(m.fingerprint not in m.purged["was"] for m in touched)


def _round(stage: str) -> int:
    return 0 if stage == "train-pretrain" else 1


def test_same_purge_again_proves_it_again(
    after: FinishedCycle, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = str(after.lake.parent / "list.txt")
    asked = ("purge", "--file", listed, "--because", "again", "--lake", str(after.lake))
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "nothing is left to purge: it was purged before" in told
    assert "read back: zeros" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "nowhere.test", "--because", "x"), "host nowhere.test"),
        (("--image-id", "12", "--because", "x"), "'12' is not 32 hex digits"),
        (("--host", "nowhere.test"), "needs a reason"),
        (("--because", "x"), "nothing to purge"),
        (("--file", "absent.txt", "--because", "x"), "absent.txt cannot be read"),
    ],
)
def test_purge_of_nothing_is_an_error_that_names_it(
    purged: FinishedCycle, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert main(("purge", *options, "--lake", str(purged.lake))) == 2
    assert said in capsys.readouterr().err
