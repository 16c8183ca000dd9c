"""`bootstrap export` as it is typed."""

import json
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cycle import ROOT, bootstrap
from export_world import damage, kept_texts, write_lake

from flows.cli import main, parser
from flows.exports import FORMATS
from storage import ids
from storage.exports.run import FORMATS as WRITERS


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "lake"
    write_lake(str(folder))
    return folder


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A folder with a lake of the test's own."""
    shutil.copytree(shared, tmp_path / "lake")
    return tmp_path


def test_formats_of_the_command_are_those_that_are_written() -> None:
    assert set(FORMATS) == WRITERS.keys()


def test_export_says_what_it_holds_and_that_it_was_read_back(folder: Path) -> None:
    command = ["export", "--lake", "lake", "--format", "ids", "--to", "x", "--shard-images", "4"]
    done = bootstrap(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    num, images = len(kept_texts()), len({image for image, _, _ in kept_texts()})
    generation = json.loads((folder / "x/export.json").read_text())["basis"]["config"]["generation"]
    assert done.stdout.splitlines()[-3:] == [
        f"export: {folder}/x",
        f"holds:  {num} texts of {images} images, as {generation} of round 1 decided",
        "check:  read back: every hash and count is as written",
    ]
    again = bootstrap(*command, cwd=folder)
    assert again.returncode == 0
    assert "(it was there already)" in again.stdout


def test_export_runs_as_the_readme_has_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().split("## Give it to others", 1)[1].split("\n## ")[0]
    commands = [line for line in section.splitlines() if line.startswith("bootstrap ")]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BOOTSTRAP_LAKE", "lake")
    assert [main(shlex.split(command)[1:]) for command in commands] == [0, 0]
    assert sorted(path.name for path in Path("exports").iterdir()) == ["shapes", "strict"]


def test_export_takes_a_parameter_of_the_policy(folder: Path) -> None:
    options = ["--lake", str(folder / "lake"), "--format", "ids", "--to", str(folder / "x")]
    assert main(["export", *options, "--policy", "itc", "--set", "threshold=0.6"]) == 0
    found = pq.read_table(folder / "x" / "data")["caption_id"].to_pylist()
    assert set(found) == {ids.caption_id(*text) for text in kept_texts(threshold=0.85)}
    config = json.loads((folder / "x" / "export.json").read_text())["basis"]["config"]
    assert (config["policy"], config["params"]) == ("itc", {"threshold": 0.6})


def test_export_names_what_was_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder / "lake", 2)
    options = ["--lake", str(folder / "lake"), "--format", "webdataset"]
    assert main(["export", *options, "--to", str(folder / "x"), "--no-verify"]) == 0
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
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    before = _made(folder)
    assert main(["export", "--lake", "lake", "--format", "ids", *options]) == 2
    assert words in capsys.readouterr().err
    assert _made(folder) == before


def _made(folder: Path) -> list[Path]:
    """Everything but what a lake keeps for whoever works in it."""
    return sorted(p for p in folder.rglob("*") if not {"work", "lake.lock"} & set(p.parts))


def test_models_are_exported_by_a_command_of_their_own() -> None:
    options = parser().parse_args(["export-model", "captioner", "--out", "x", "--round", "1"])
    assert (options.name, options.role, options.out) == ("export-model", "captioner", "x")
