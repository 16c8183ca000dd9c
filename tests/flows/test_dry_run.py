"""`bootstrap ingest --dry-run`: what a list will give, without a lake."""

from pathlib import Path

from cycle import FinishedCycle, bootstrap, tiny_settings, write_settings


def test_dry_run_tells_the_yield_and_leaves_nothing(
    finished: FinishedCycle, world_folder: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    config = write_settings(tmp_path / "tiny.yaml", tiny_settings(lake, world_folder))
    done = bootstrap("ingest", "--dry-run", "30", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = " ".join(done.stdout.split())
    assert "30 of " in said
    assert "ok" in said
    assert "Expected of all rows: " in said
    assert "an image, " in said
    assert not lake.exists()
    # Prefect's own folder is there as after any command.
    assert {path.name for path in tmp_path.iterdir()} <= {"tiny.yaml", ".bootstrap"}


def test_dry_run_of_nothing_names_the_remedy(tmp_path: Path) -> None:
    config = write_settings(tmp_path / "none.yaml", {"preset": None})
    done = bootstrap("ingest", "--dry-run", "5", "--config", str(config), cwd=tmp_path)
    assert done.returncode != 0
    assert "ingest.url_lists names no list" in done.stderr
    none = bootstrap("ingest", "--dry-run", "0", "--config", str(config), cwd=tmp_path)
    assert "--dry-run 0: try 1 row or more" in none.stderr
