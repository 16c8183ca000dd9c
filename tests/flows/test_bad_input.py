"""Bad input at the command line: what is said, and that nothing is lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cycle import (
    FinishedCycle,
    bootstrap,
    command_environment,
    copied,
    stamps,
    write_settings,
)

from storage import Lake

Refusal = Callable[..., str]


@pytest.fixture
def refusal(api_url: str) -> Refusal:
    """Run a command that must be refused; what it says, on one line."""

    def run(folder: Path, *arguments: str) -> str:
        done = bootstrap(*arguments, cwd=folder, api_url=api_url)
        assert done.returncode == 2, done.stdout[-1500:] + done.stderr[-1500:]
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    return run


def _changed(finished: FinishedCycle, tmp_path: Path, **sections: dict) -> str:
    settings = json.loads(json.dumps(finished.settings))
    for name, fields in sections.items():
        settings[name] = {**settings[name], **fields} if settings.get(name) else fields
    return str(write_settings(tmp_path / "changed.yaml", settings))


def test_changed_setting_names_the_field_and_both_ways_out(
    refusal: Refusal, finished: FinishedCycle, tmp_path: Path
) -> None:
    before = stamps(finished.lake, "tables", "rounds", "models")
    config = _changed(finished, tmp_path, caption={"top_p": 0.5})
    said = refusal(tmp_path, "caption", "--config", config)
    assert "caption.top_p: 0.9 -> 0.5" in said
    assert "--new-round" in said
    assert stamps(finished.lake, "tables", "rounds", "models") == before


def test_second_run_on_a_lake_is_refused_naming_the_first(
    refusal: Refusal, finished: FinishedCycle, tmp_path: Path
) -> None:
    with Lake.open(str(finished.lake)).lock("a long evaluation"):
        said = refusal(tmp_path, "decide", "--config", str(finished.config))
    assert "a long evaluation" in said
    assert str(os.getpid()) in said


def test_lake_of_another_schema_version_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    Lake.open(str(lake), create=True)
    record = json.loads((lake / "lake.json").read_text())
    (lake / "lake.json").write_text(json.dumps(record | {"schema_version": 99}))
    said = refusal(tmp_path, "sql", "SELECT 1", "--lake", str(lake))
    assert "99" in said


def test_stage_without_its_input_names_the_command_to_run(refusal: Refusal, tmp_path: Path) -> None:
    said = refusal(tmp_path, "caption", "--lake", str(tmp_path / "lake"), "--preset", "photos")
    assert "bootstrap finetune-captioner" in said


def test_next_round_of_an_empty_lake_says_to_run_the_cycle_first(
    refusal: Refusal, tmp_path: Path
) -> None:
    said = refusal(tmp_path, "next-round", "--lake", str(tmp_path / "lake"))
    assert "run the full cycle first" in said


def test_sql_without_a_lake_says_how_to_name_one(refusal: Refusal, tmp_path: Path) -> None:
    assert "--lake" in refusal(tmp_path, "sql", "SELECT 1")


@pytest.mark.parametrize(
    ("table", "ingest", "expected"),
    [
        ({"link": ["http://x.test/1.jpg"]}, {}, "url"),
        ({"url": [], "alt_text": []}, {}, "no row"),
    ],
    ids=["absent column", "empty list"],
)
def test_url_list_that_cannot_be_used(
    refusal: Refusal, tmp_path: Path, table: dict, ingest: dict, expected: str
) -> None:
    urls = tmp_path / "urls.parquet"
    pq.write_table(pa.table({k: pa.array(v, pa.string()) for k, v in table.items()}), urls)
    settings = {"preset": None, "ingest": {"url_lists": [{"path": str(urls)}]}, **ingest}
    config = write_settings(tmp_path / "s.yaml", settings)
    said = refusal(tmp_path, "ingest", "--config", str(config), "--lake", str(tmp_path / "lake"))
    assert str(urls) in said
    assert expected in said


def test_captions_of_absent_images_are_counted_and_named(refusal: Refusal, tmp_path: Path) -> None:
    captions = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"image": ["gone.jpg"], "caption": ["a dog"]}), captions)
    settings = {
        "preset": None,
        "ingest": {"human": [{"captions": str(captions), "images": str(tmp_path)}]},
    }
    config = write_settings(tmp_path / "s.yaml", settings)
    said = refusal(tmp_path, "ingest", "--config", str(config), "--lake", str(tmp_path / "lake"))
    assert "gone.jpg" in said


def test_cycle_without_human_pairs_is_refused_before_any_download(
    refusal: Refusal, tmp_path: Path
) -> None:
    urls = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": ["http://x.test/1.jpg"], "alt_text": ["a dog"]}), urls)
    config = write_settings(
        tmp_path / "s.yaml", {"preset": None, "ingest": {"url_lists": [{"path": str(urls)}]}}
    )
    said = refusal(tmp_path, "run", "--config", str(config), "--lake", str(tmp_path / "lake"))
    assert "ingest.human" in said
    assert not (tmp_path / "lake" / "tables" / "pairs").exists()


def test_corrected_setting_is_taken_when_the_first_attempt_made_nothing(
    refusal: Refusal, tmp_path: Path
) -> None:
    lake, captions = tmp_path / "lake", tmp_path / "captions.parquet"
    pq.write_table(pa.table({"image": ["gone.jpg"], "caption": ["a dog"]}), captions)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        sets = [{"captions": str(captions), "images": str(tmp_path / folder)}]
        config = write_settings(tmp_path / "s.yaml", {"preset": None, "ingest": {"human": sets}})
        said = refusal(tmp_path, "ingest", "--config", str(config), "--lake", str(lake))
        assert folder in said
        assert "other settings" not in said


def test_nothing_to_take_in_is_an_error(refusal: Refusal, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "s.yaml", {"preset": None})
    said = refusal(tmp_path, "ingest", "--config", str(config), "--lake", str(tmp_path / "lake"))
    assert "ingest.url_lists" in said


def test_damaged_part_is_named_then_repaired_then_made_again(
    refusal: Refusal, finished: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    cycle = copied(finished, tmp_path)
    part = next(cycle.lake.glob("tables/captions/round=0001/*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    said = refusal(tmp_path, "decide", "--config", str(cycle.config), "--on-stale", "rebuild")
    assert part.name in said
    assert "bootstrap repair" in said
    repaired = bootstrap("repair", "--lake", str(cycle.lake), cwd=tmp_path)
    assert part.name in repaired.stdout
    again = bootstrap("run", "--config", str(cycle.config), cwd=tmp_path, api_url=api_url)
    assert again.returncode == 0, again.stdout[-1500:] + again.stderr[-1500:]
    assert part.read_bytes() == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    refusal: Refusal, finished: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if not _mounted(small, "size=300k"):
        pytest.skip("no right to mount a tmpfs here")
    try:
        settings = finished.settings | {
            "machine": finished.settings["machine"]
            | {"lake": str(small / "lake"), "scratch": str(tmp_path / "scratch")}
        }
        config = str(write_settings(tmp_path / "small.yaml", settings))
        said = refusal(tmp_path, "ingest", "--config", config)
        assert "space" in said or "full" in said.lower()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = bootstrap("ingest", "--config", config, cwd=tmp_path, api_url=api_url)
        assert done.returncode == 0, done.stderr[-1500:]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_folder_that_cannot_be_written_is_named(refusal: Refusal, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() == 0 and not _mounted(closed, "ro"):
        pytest.skip("root may write anywhere, and has no right to mount a read-only folder here")
    try:
        said = refusal(tmp_path, "ingest", "--lake", str(closed / "lake"))
        assert str(closed) in said
        assert "write" in said
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(closed)], check=True)


def _mounted(folder: Path, options: str) -> bool:
    """Mount a small tmpfs on a folder of the test's own; False where that is not allowed."""
    arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(arguments, check=False, capture_output=True).returncode == 0


def test_commands_without_options_explain_themselves() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "--help"],
        env=command_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("run", "quickstart", "next-round", "sql", "repair", "up", "down"):
        assert command in done.stdout
