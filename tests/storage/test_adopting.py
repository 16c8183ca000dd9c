"""Sets of pictures that somebody has already, in every shape, taken in without a download."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_world import PictureServer, jpeg, photo, write_list

import storage
from storage.adopted import place_of
from storage.catalog import query
from storage.errors import ConfigError, CorruptShard, EmptyInput, MissingColumn, StaleOutput
from storage.fs import Root
from storage.intake.adopting.adopt import adopt_images
from storage.intake.adopting.image_set import ImageSetConfig
from storage.intake.download_config import DownloadConfig
from storage.intake.human import CaptionSetConfig, ingest_captions
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls
from storage.lake import Lake
from storage.purge import Request, asked_image, purge
from storage.repair import find_damage
from storage.shards import read_verified_image
from storage.spans import Wanted, read_images

CONFIG = DownloadConfig(shard_rows=4, min_image_side_px=8)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tars(folder: Path, num: int = 3, samples: int = 4) -> Path:
    """Tars of pictures that differ, each with two texts."""
    for n in range(num):
        members = []
        for i in range(n * samples, (n + 1) * samples):
            members += [(f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.txt", f"picture {i}".encode())]
            told = {"caption": f"number {i}", "url": f"http://a.test/{i}.jpg", "colour": "red"}
            members.append((f"{i:05d}.json", json.dumps(told).encode()))
        write_tar(folder / f"{n:05d}.tar", members)
    return folder


def image_set(folder: Path | str, **changes: Any) -> ImageSetConfig:
    return ImageSetConfig(**{"path": str(folder), "name": "mine"} | changes)


def pairs_of(lake: Lake) -> list[dict[str, Any]]:
    return query(lake, "FROM pairs WHERE pool = 'web' ORDER BY row").to_pylist()


def captions_of(lake: Lake) -> Counter[str]:
    found = query(lake, "SELECT caption FROM captions WHERE source = 'web' AND status = 'ok'")
    return Counter(found.column(0).to_pylist())


def assert_readable(lake: Lake) -> None:
    """Every image is where its row says, by the single read and by the read of many."""
    for pair in pairs_of(lake):
        if pair["status"] == "ok":
            where = (pair["shard"], pair["offset"], pair["size"])
            data = read_verified_image(lake, *where, pair["image_id"])
            wanted = Wanted(image_id=pair["image_id"], offset=where[1], size=where[2])
            assert read_images(lake, pair["shard"], [wanted]) == [data]
    assert list(find_damage(lake)) == []


def test_pictures_in_tars_stay_where_they_are(lake: Lake, tmp_path: Path) -> None:
    folder = tars(tmp_path / "set")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done: list[tuple[int, int]] = []
    parts = adopt_images(
        lake, image_set(folder), CONFIG, round=1, on_progress=lambda *at: done.append(at)
    )
    pairs = pairs_of(lake)
    assert [pair["status"] for pair in pairs] == ["ok"] * 12
    assert [pair["row"] for pair in pairs] == list(range(12))
    assert pairs[5]["url"] == "http://a.test/5.jpg"
    assert json.loads(pairs[5]["extra"]) == {"colour": "red", "name": "00001.tar/00005"}
    assert captions_of(lake) == Counter(
        [f"picture {i}" for i in range(12)] + [f"number {i}" for i in range(12)]
    )
    assert [path for path in lake.root.list("shards") if path.endswith(".tar")] == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert_readable(lake)
    assert adopt_images(lake, image_set(folder), CONFIG, round=1) == parts


def test_what_img2dataset_made_is_taken_in_with_its_failures(
    tmp_path: Path, pictures: PictureServer, local_lake: Lake
) -> None:
    names = [
        "ok1.jpg",
        "gone.jpg",
        "ok2.jpg",
        "broken.jpg",
        "page.jpg",
        "truncated.jpg",
        "noai.jpg",
    ]
    rows = [(name, f"text of {name}") for name in names] + [("http://nowhere.invalid/", "no host")]
    urls = write_list(tmp_path / "urls.parquet", rows, host="adopted.test")
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY"), pictures.proxy)
    asked = {
        "url_list": urls,
        "input_format": "parquet",
        "caption_col": "alt_text",
        "save_additional_columns": '["width_hint"]',
        "output_format": "webdataset",
        "output_folder": tmp_path / "set",
        "processes_count": 1,
        "thread_count": 4,
        "disable_all_reencoding": True,
        "enable_wandb": False,
    }
    subprocess.run(
        [sys.executable, "-m", "img2dataset.main", *(f"--{k}={v}" for k, v in asked.items())],
        env=os.environ | proxies | {"NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": ""},
        check=True,
        timeout=100,
        cwd=tmp_path,
    )
    adopt_images(local_lake, image_set(tmp_path / "set"), CONFIG, round=1)
    found = {pair["url"].rpartition("/")[2]: pair for pair in pairs_of(local_lake)}
    assert {name: pair["status"] for name, pair in found.items()} == {
        "ok1.jpg": "ok",
        "gone.jpg": "http_4xx",
        "ok2.jpg": "ok",
        "broken.jpg": "http_5xx",
        "page.jpg": "not_an_image",
        "truncated.jpg": "decode_error",
        "noai.jpg": "opted_out",
        "": found[""]["status"],
    }
    assert found["gone.jpg"]["reason"] == "HTTP Error 404: Not Found"
    assert json.loads(found["ok2.jpg"]["extra"])["width_hint"] == 2
    assert captions_of(local_lake) == Counter(["text of ok1.jpg", "text of ok2.jpg"])
    assert_readable(local_lake)


def test_odd_tars_cost_their_odd_rows(local_lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_tar(
        folder / "a.tar",
        [
            ("/etc/passwd.jpg", jpeg(1)),
            ("../../up.jpg", jpeg(2)),
            ("twice.jpg", jpeg(3)),
            ("twice.jpg", jpeg(4)),
            ("copy.jpg", jpeg(1)),
            ("none.txt", b"no picture here"),
            ("page.jpg", b"<html>"),
            ("small.jpg", jpeg(5, side_px=4)),
            ("many.jpg", jpeg(6)),
            ("many.txt", b"one"),
            ("many.1.txt", b"two"),
            ("many.json", json.dumps({"captions": ["three", {"raw": "four"}, "one"]}).encode()),
            ("bad.jpg", jpeg(7)),
            ("bad.json", b"{"),
            ("pair.left.jpg", jpeg(8)),
            ("pair.right.png", jpeg(9)),
            ("pair.txt", b"both"),
            ("huge.jpg", jpeg(10) + bytes(300_000)),
            ("\udcffname.jpg".encode("utf-8", "surrogateescape").decode("latin-1"), jpeg(11)),
        ],
    )
    torn = write_tar(folder / "b.tar", [(f"{i}.jpg", jpeg(20 + i)) for i in range(3)])
    torn.write_bytes(torn.read_bytes()[:3000])
    (folder / "c.tar").write_bytes(b"not a tar at all" * 100)
    (folder / "d.tar").write_bytes(b"")
    config = replace(CONFIG, max_image_bytes=200_000)
    adopt_images(local_lake, image_set(folder), config, round=1)
    pairs = {pair["url"]: pair for pair in pairs_of(local_lake)}
    statuses = {name: pair["status"] for name, pair in pairs.items()}
    assert statuses.pop("b.tar/") == statuses.pop("c.tar/") == "lost"
    assert "breaks off after 1 samples" in pairs["b.tar/"]["reason"]
    assert statuses == {
        "a.tar//etc/passwd": "ok",
        "a.tar/../../up": "ok",
        "a.tar/twice": "ok",
        "a.tar/twice#2": "ok",
        "a.tar/copy": "duplicate_image",
        "a.tar/none": "not_an_image",
        "a.tar/page": "not_an_image",
        "a.tar/small": "too_small",
        "a.tar/many": "ok",
        "a.tar/bad": "ok",
        "a.tar/pair.left.jpg": "ok",
        "a.tar/pair.right.png": "ok",
        "a.tar/huge": "too_large",
        "a.tar/ÿname": "ok",
        "b.tar/0": "ok",
        "d.tar/": "lost",
    }
    assert captions_of(local_lake) == Counter(["one", "two", "three", "four", "both", "both"])
    assert_readable(local_lake)


def hf_rows(first: int, last: int) -> pa.Table:
    numbers = range(first, last)
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in numbers]
    images[-1] = {"bytes": None, "path": "elsewhere.jpg"}
    texts = [[f"picture {i}", f"again {i}"] for i in numbers]
    return pa.table({"image": images, "caption": texts, "split": ["train"] * len(images)})


def test_parquet_files_with_pictures_in_them_are_packed(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(hf_rows(0, 10), tmp_path / "data/train-0.parquet", row_group_size=3)
    pq.write_table(hf_rows(10, 12), tmp_path / "data/train-1.parquet")
    parts = adopt_images(lake, image_set(tmp_path / "data"), CONFIG, round=1)
    assert [ref.num_rows for ref in parts if ref.table == "pairs"] == [4, 4, 2, 2]
    pairs = pairs_of(lake)
    assert [pair["row"] for pair in pairs] == list(range(12))
    lost = [pair["row"] for pair in pairs if pair["status"] == "lost"]
    assert lost == [9, 11]
    assert "elsewhere.jpg" in pairs[9]["reason"]
    assert captions_of(lake).total() == 20
    assert_readable(lake)
    with pytest.raises(MissingColumn, match="image_column 'split' is of type string"):
        adopt_images(lake, image_set(tmp_path / "data", image_column="split"), CONFIG, round=2)
    with pytest.raises(MissingColumn, match="no column of texts: title"):
        adopt_images(lake, image_set(tmp_path / "data", caption_column="title"), CONFIG, round=2)


def test_a_folder_of_pictures_has_its_texts_beside_them(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "sub/4.JPG").write_bytes(jpeg(4))
    (folder / "0.txt").write_text("zero\n\nnought\n")
    (folder / "1.json").write_text('{"caption": "one", "url": "http://a.test/1.jpg"}')
    (folder / "metadata.csv").write_text('file_name,text\n2.jpg,"two, really"\n')
    (folder / "sub/metadata.jsonl").write_text('{"file_name": "4.JPG", "caption": ["four"]}\n')
    (folder / "notes.md").write_text("no part of it")
    adopt_images(lake, image_set(folder), CONFIG, round=1)
    assert [pair["url"] for pair in pairs_of(lake)] == [
        "0.jpg", "http://a.test/1.jpg", "2.jpg", "3.jpg", "sub/4.JPG",
    ]  # fmt: skip
    assert captions_of(lake) == Counter(["zero", "nought", "one", "two, really", "four"])
    assert_readable(lake)


def coco_file(folder: Path, names: list[str]) -> str:
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    texts = [{"id": i, "image_id": i // 2, "caption": f"text {i}"} for i in range(2 * len(names))]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": texts}))
    return str(path)


def test_captions_files_name_pictures_of_a_folder(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    coco = coco_file(tmp_path, [*(f"{i}.jpg" for i in range(5)), "absent.jpg"])
    adopt_images(lake, image_set(folder, captions=coco), CONFIG, round=1)
    pairs = pairs_of(lake)
    assert [pair["status"] for pair in pairs] == ["ok"] * 5 + ["lost"]
    assert captions_of(lake) == Counter(f"text {i}" for i in range(10))
    (tmp_path / "table.csv").write_text("image,caption\n0.jpg,nought\n1.jpg,one\n1.jpg,eins\n")
    adopt_images(
        lake,
        image_set(folder, captions=str(tmp_path / "table.csv"), name="other"),
        CONFIG,
        round=2,
    )
    again = [pair["status"] for pair in pairs_of(lake) if pair["source_name"] == "other"]
    assert again == ["duplicate_image"] * 2
    others = coco_file(tmp_path, ["COCO_1.jpg", "COCO_2.jpg"])
    with pytest.raises(ConfigError, match=r"names 2 pictures \(COCO_1.jpg, COCO_2.jpg\), of which"):
        adopt_images(lake, image_set(folder, captions=others), CONFIG, round=3)


def test_a_set_may_lie_on_another_store_or_be_named_by_a_pattern(
    lake: Lake, tmp_path: Path
) -> None:
    folder = tars(tmp_path / "set")
    remote = f"memory://{tmp_path.name}-set"
    root = Root(remote)
    for path in folder.iterdir():
        root.write_bytes(f"deep/{path.name}", path.read_bytes())
    adopt_images(lake, image_set(f"{remote}/deep/0000[01].tar"), CONFIG, round=1)
    assert len(pairs_of(lake)) == 8
    adopt_images(lake, image_set(f"{remote}/deep/00002.tar"), CONFIG, round=1, position=1)
    assert len(pairs_of(lake)) == 12
    assert_readable(lake)


def test_parquet_files_on_another_store_are_read_there(lake: Lake, tmp_path: Path) -> None:
    root = Root(f"memory://{tmp_path.name}-data")
    whole = io.BytesIO()
    pq.write_table(hf_rows(0, 6), whole)
    root.write_bytes("train.parquet", whole.getvalue())
    adopt_images(lake, image_set(root.uri), CONFIG, round=1)
    assert [pair["status"] for pair in pairs_of(lake)] == ["ok"] * 5 + ["lost"]
    write_tar(tmp_path / "0.tar", [("00.jpg", jpeg(50)), ("01.jpg", jpeg(51))])
    rows = {"key": ["00", "01", "02"], "status": ["success", "success", "failed_to_download"]}
    rows |= {"caption": ["a", "b", "c"], "url": ["http://a/0", "http://a/1", "http://a/2"]}
    rows |= {"error_message": [None, None, "<urlopen error timed out>"]}
    statistics = io.BytesIO()
    pq.write_table(pa.table(rows), statistics)
    other = Root(f"memory://{tmp_path.name}-tars")
    other.write_bytes("0.tar", (tmp_path / "0.tar").read_bytes())
    other.write_bytes("0.parquet", statistics.getvalue())
    adopt_images(lake, image_set(other.uri, name="tars"), CONFIG, round=1, position=1)
    found = [pair for pair in pairs_of(lake) if pair["source_name"] == "tars"]
    assert [pair["status"] for pair in found] == ["ok", "ok", "timeout"]
    assert captions_of(lake)["b"] == 1
    assert_readable(lake)


def test_a_set_that_is_not_there_or_of_no_shape_is_refused(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(EmptyInput, match=r"no file below .*absent; check the path"):
        adopt_images(lake, image_set(tmp_path / "absent"), CONFIG, round=1)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.tar.gz").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"a.tar.gz is compressed, .* unpack it"):
        adopt_images(lake, image_set(tmp_path / "set"), CONFIG, round=1)
    with pytest.raises(ConfigError, match="needs `captions`"):
        image_set(tmp_path, format="coco")
    with pytest.raises(ConfigError, match="format 'tfrecord' is unknown"):
        image_set(tmp_path, format="tfrecord")
    write_tar(tmp_path / "pages/0.tar", [("0.jpg", b"<html>"), ("1.jpg", b"<html>")])
    with pytest.raises(EmptyInput, match="not_an_image 2"):
        adopt_images(lake, image_set(tmp_path / "pages"), CONFIG, round=1)
    # Another path is no change of something that gave nothing.
    tars(tmp_path / "good", num=1)
    adopt_images(lake, image_set(tmp_path / "good"), CONFIG, round=1)
    assert [pair["status"] for pair in pairs_of(lake)] == ["ok"] * 4


def test_a_later_round_takes_in_what_is_new_and_refuses_what_has_changed(
    lake: Lake, tmp_path: Path
) -> None:
    folder = tars(tmp_path / "set", num=2)
    adopt_images(lake, image_set(folder), CONFIG, round=1)
    assert adopt_images(lake, image_set(folder), CONFIG, round=2) == []
    tars(folder, num=3)
    with pytest.raises(
        StaleOutput, match=r"images-00\.json: this was ingested from something else"
    ):
        adopt_images(lake, image_set(folder), CONFIG, round=1)
    parts = adopt_images(lake, image_set(folder), CONFIG, round=3)
    assert [ref.name for ref in parts] == ["web-0003-t00-00000"] * 2
    assert len(pairs_of(lake)) == 12
    adopt_images(lake, image_set(folder), CONFIG, round=1, on_stale="rebuild")
    assert_readable(lake)


def test_a_list_and_a_set_know_each_others_pictures(
    local_lake: Lake, tmp_path: Path, pictures: PictureServer
) -> None:
    folder = write_tar(tmp_path / "set/0.tar", [("a.jpg", photo(1)), ("b.jpg", jpeg(2))]).parent
    held = tmp_path / "held"
    held.mkdir()
    (held / "1.jpg").write_bytes(photo(1))
    (tmp_path / "held.csv").write_text("image,caption\n1.jpg,a held-out picture\n")
    ingest_captions(
        local_lake,
        CaptionSetConfig(
            captions=str(tmp_path / "held.csv"), images=str(held), pool="heldout", name="held"
        ),
    )
    adopt_images(local_lake, image_set(folder), CONFIG, round=1)
    assert [pair["status"] for pair in pairs_of(local_lake)] == ["eval_overlap", "ok"]
    rows = [("ok2.jpg", "two"), ("ok3.jpg", "three")]
    urls = write_list(tmp_path / "urls.parquet", rows, host="adopted.test")
    config = replace(CONFIG, http_proxy=pictures.proxy, robots="ignore", retry_passes=0, threads=2)
    ingest_urls(local_lake, UrlListConfig(path=str(urls)), config, round=2)
    listed = [pair["status"] for pair in pairs_of(local_lake) if pair["source_name"] == "web"]
    assert listed == ["duplicate_image", "ok"]


def test_a_purged_picture_is_left_to_its_owner_and_not_taken_in_again(
    local_lake: Lake, tmp_path: Path
) -> None:
    folder = tars(tmp_path / "set", num=1)
    adopt_images(local_lake, image_set(folder), CONFIG, round=1)
    before, gone = (folder / "00000.tar").read_bytes(), pairs_of(local_lake)[1]
    request = Request(asked=(asked_image(gone["image_id"]),), because="asked by mail")
    done = purge(local_lake, request)
    assert (folder / "00000.tar").read_bytes() == before
    tar, at = folder / "00000.tar", gone["offset"]
    assert done.proof.in_place == [f"{tar}, {gone['size']} bytes from {at}"]
    assert [pair["status"] for pair in pairs_of(local_lake)] == ["ok", "purged", "ok", "ok"]
    (folder / "00000.tar").rename(folder / "renamed.tar")
    adopt_images(local_lake, image_set(folder, name="again"), CONFIG, round=2)
    again = [pair for pair in pairs_of(local_lake) if pair["source_name"] == "again"]
    assert [pair["status"] for pair in again] == [
        "duplicate_image", "purged", "duplicate_image", "duplicate_image",
    ]  # fmt: skip
    assert again[1]["alt_text"] is None
    assert again[1]["reason"] == "asked by mail"


def test_a_moved_set_is_found_again_where_its_record_says(local_lake: Lake, tmp_path: Path) -> None:
    folder = tars(tmp_path / "set", num=1)
    adopt_images(local_lake, image_set(folder), CONFIG, round=1)
    first = pairs_of(local_lake)[0]
    folder.rename(tmp_path / "moved")
    where = (first["shard"], first["offset"], first["size"], first["image_id"])
    with pytest.raises(
        CorruptShard, match=r"write its new folder as `root` into shards/web-0001-t00\.json"
    ):
        read_verified_image(local_lake, *where)
    record = tmp_path / "lake/shards/web-0001-t00.json"
    record.write_text(record.read_text().replace(str(folder), str(tmp_path / "moved")))
    moved = Lake.open(local_lake.uri)
    assert place_of(moved, first["shard"])[1] == "00000.tar"
    assert_readable(moved)


SCRIPT = """
import sys
from storage import DownloadConfig, Lake
from storage.intake.adopting.adopt import adopt_images
from storage.intake.adopting.image_set import ImageSetConfig
adopt_images(
    Lake.open(sys.argv[1]), ImageSetConfig(path=sys.argv[2], name="mine"),
    DownloadConfig(shard_rows=4, min_image_side_px=8), round=1,
)
"""


@pytest.mark.parametrize("shape", ["tars", "folder"])
def test_killed_the_tables_are_those_of_an_undisturbed_run(tmp_path: Path, shape: str) -> None:
    folder = tmp_path / "set"
    if shape == "tars":
        tars(folder, num=40)
    else:
        folder.mkdir()
        for i in range(160):
            (folder / f"{i:03d}.jpg").write_bytes(jpeg(i))
            (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    disturbed = Lake.open(str(tmp_path / "a"), create=True)
    undisturbed = Lake.open(str(tmp_path / "b"), create=True)
    home = str(Path(storage.__file__).parents[1])
    for committed in (2, 15, 30):
        run = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, disturbed.uri, str(folder)],
            env=os.environ | {"PYTHONPATH": home},
        )
        while run.poll() is None:
            if len(disturbed.root.list("tables/pairs")) >= 2 * committed:
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        run.wait()
    adopt_images(disturbed, image_set(folder), CONFIG, round=1)
    adopt_images(undisturbed, image_set(folder), CONFIG, round=1)
    assert pairs_of(disturbed) == pairs_of(undisturbed)
    assert len(pairs_of(disturbed)) == 160
    assert captions_of(disturbed) == captions_of(undisturbed)
    for shard in undisturbed.root.list_recursive("shards"):
        assert disturbed.root.read_bytes(shard) == undisturbed.root.read_bytes(shard)
