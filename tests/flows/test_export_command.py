"""`bootstrap export` as it is typed."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cycle import bootstrap
from export_world import damage, kept_texts, write_lake

from flows.cli import main, parser
from flows.exports import FORMATS
from storage import ids
from storage.exports.run import FORMATS as WRITERS


def test_formats_of_the_command_are_those_that_are_written() -> None:
    assert set(FORMATS) == WRITERS.keys()


def test_export_says_what_it_holds_and_that_it_was_read_back(tmp_path: Path) -> None:
    write_lake(str(tmp_path / "lake"))
    command = ["export", "--lake", "lake", "--format", "ids", "--to", "x", "--shard-images", "4"]
    done = bootstrap(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    num, images = len(kept_texts()), len({image for image, _, _ in kept_texts()})
    generation = json.loads((tmp_path / "x/export.json").read_text())["basis"]["config"][
        "generation"
    ]
    assert done.stdout.splitlines()[-3:] == [
        f"export: {tmp_path}/x",
        f"holds:  {num} texts of {images} images, as {generation} of round 1 decided",
        "check:  read back: every hash and count is as written",
    ]
    again = bootstrap(*command, cwd=tmp_path)
    assert again.returncode == 0
    assert "(it was there already)" in again.stdout


def test_export_takes_a_parameter_of_the_policy(tmp_path: Path) -> None:
    write_lake(str(tmp_path / "lake"))
    options = ["--lake", str(tmp_path / "lake"), "--format", "ids", "--to", str(tmp_path / "x")]
    assert main(["export", *options, "--policy", "itc", "--set", "threshold=0.6"]) == 0
    found = pq.read_table(tmp_path / "x" / "data")["caption_id"].to_pylist()
    assert set(found) == {ids.caption_id(*text) for text in kept_texts(threshold=0.85)}
    config = json.loads((tmp_path / "x" / "export.json").read_text())["basis"]["config"]
    assert (config["policy"], config["params"]) == ("itc", {"threshold": 0.6})


def test_export_names_what_was_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lake(str(tmp_path / "lake"))
    damage(tmp_path / "lake", 2)
    options = ["--lake", str(tmp_path / "lake"), "--format", "webdataset"]
    assert main(["export", *options, "--to", str(tmp_path / "x"), "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert "lost:   1 images could not be read; not_exported.jsonl says which and why" in said
    assert "check:  not read back" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "lake"], "holds something that is not an export: lake.json"),
        (
            ["--to", "new", "--policy", "clip"],
            "policy 'clip' is unknown; there are all, best_of, blip",
        ),
        (["--to", "new", "--set", "threshold"], "--set 'threshold' is not PARAMETER=VALUE"),
        (["--to", "new", "--policy", "itc", "--set", "treshold=0.4"], "treshold"),
        (["--to", "new", "--round", "9"], "round 9 of lake"),
        (["--to", "new", "--shard-images", "0"], "shard_images must be 1 or more, got 0"),
        (["--to", "new", "--captions", "list"], "format ids has captions each, not list"),
        (["--to", "nowhere://x"], "target 'nowhere://x': no file system for this address"),
        (["--to", "new", "--lake", "elsewhere"], "no lake at"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_export_refuses_with_a_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    write_lake(str(tmp_path / "lake"))
    monkeypatch.chdir(tmp_path)
    before = _made(tmp_path)
    assert main(["export", "--lake", "lake", "--format", "ids", *options]) == 2
    assert words in capsys.readouterr().err
    assert _made(tmp_path) == before


def _made(folder: Path) -> list[Path]:
    """Everything but what a lake keeps for whoever works in it."""
    return sorted(p for p in folder.rglob("*") if not {"work", "lake.lock"} & set(p.parts))


def test_models_are_exported_by_a_command_of_their_own() -> None:
    options = parser().parse_args(["export-model", "captioner", "--out", "x", "--round", "1"])
    assert (options.name, options.role, options.out) == ("export-model", "captioner", "x")
