"""The benchmark of data feeding compares equal rows and writes lines in the projects' form."""

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def feeding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("feeding")


def test_feeding_gives_both_sides_the_same_rows(feeding: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    num_rows = feeding.BATCH_ROWS + 1000
    feeding.write_rows(path, num_rows)
    ours, theirs = feeding.open_rows(path, num_rows), feeding.read_list(path)
    assert len(ours) == len(theirs) == num_rows
    for i in (0, 1, 999, feeding.BATCH_ROWS - 1, feeding.BATCH_ROWS, num_rows - 1):
        assert asdict(ours.row(i)) == theirs[i]
    assert len(ours.image_starts()) == num_rows // 2


def test_feeding_measures_a_process_and_writes_lines(feeding: ModuleType, tmp_path: Path) -> None:
    sizes = (500, 100_500)
    figures: dict[str, dict[int, dict[str, float]]] = {"list": {}, "all": {}, "one": {}}
    for num_rows in sizes:
        path = tmp_path / f"{num_rows}.arrow"
        feeding.write_rows(path, num_rows)
        for way in ("list", "all"):
            figures[way][num_rows] = feeding.measured(way, path, num_rows)
    figures["one"] = figures["all"]
    lines = feeding.lines_of(figures)
    assert all(set(line) == {"name", "ours", "theirs", "ratio", "target"} for line in lines)
    growth = [line for line in lines if "one more row" in line["name"]]
    assert len(growth) == 2
    assert all(line["ratio"] > line["target"] for line in growth)
