"""A whole cycle on pictures that were there already: nothing is downloaded and no picture is copied."""

import io
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cycle import bootstrap, tiny_settings, write_settings

from flows.quickstart.world import WorldConfig, build_world
from flows.settings import load_settings
from storage import Lake, query

WORLD = WorldConfig(
    num_web=60, num_human=20, num_heldout=16, human_captions=2, fault_share=0.0, image_size_px=32
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings of a cycle whose web is two tars with two texts a picture."""
    world = build_world(WORLD, tmp_path / "world")
    listed = pq.read_table(world.url_list).to_pylist()
    (tmp_path / "set").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "set" / f"{number}.tar", "w") as tar:
            for row in listed[number::2]:
                name = row["url"].rpartition("/")[2]
                picture = world.folder / "web" / "images" / name
                if not picture.exists():
                    continue
                stem = picture.stem
                _add(tar, picture.name, picture.read_bytes())
                _add(tar, f"{stem}.txt", row["alt_text"].encode())
                _add(tar, f"{stem}.1.txt", f"again: {row['alt_text']}".encode())
    settings = tiny_settings(tmp_path / "lake", tmp_path / "unused")
    people = [
        {"captions": str(captions), "images": str(images), "name": name}
        for captions, images, name in (
            (world.human_captions, world.human_images, "human"),
            (world.heldout_captions, world.heldout_images, "heldout"),
        )
    ]
    settings["ingest"] |= {
        "texts_per_image": 5,
        "image_sets": [{"path": str(tmp_path / "set"), "name": "tars"}],
        "human": people[:1],
        "heldout": people[1:],
    }
    return write_settings(tmp_path / "adopted.yaml", settings | {"world": None})


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_a_cycle_runs_on_tars_that_stay_where_they_are(
    config: Path, tmp_path: Path, api_url: str
) -> None:
    done = bootstrap("run", "--config", str(config), cwd=tmp_path, api_url=api_url)
    assert done.returncode == 0, done.stderr[-3000:]
    lake = Lake.open(str(tmp_path / "lake"))
    pairs = query(lake, "SELECT status, shard FROM pairs WHERE pool = 'web'").to_pylist()
    stored = {pair["shard"] for pair in pairs if pair["status"] == "ok"}
    assert stored == {"web-0001-t00-00000", "web-0001-t00-00001"}
    assert not [name for name in lake.root.list("shards") if name.startswith("web-0001-t00-")]
    most = query(
        lake,
        "SELECT source, count(*) AS texts, count(DISTINCT image_id) AS images FROM decisions GROUP BY ALL",
    ).to_pylist()
    counts = {row["source"]: (row["texts"], row["images"]) for row in most}
    texts, images = counts["web"]
    assert texts == 2 * images
    assert query(lake, "SELECT status FROM rounds").to_pylist()[0]["status"] in (
        "promoted",
        "refused",
    )


def test_lakes_without_image_sets_have_the_fingerprint_that_they_had(tmp_path: Path) -> None:
    settings = load_settings("quickstart")
    assert "image_sets" not in settings.as_basis()["ingest"]
    changes = {"world": None, "ingest": {"image_sets": [{"path": str(tmp_path), "name": "a"}]}}
    given = load_settings("quickstart", changes=changes)
    assert given.as_basis()["ingest"]["image_sets"][0]["name"] == "a"
