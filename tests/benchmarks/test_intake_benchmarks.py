"""The benchmarks of the intake measure real runs and write lines in the project's form."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def intake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("intake")


def test_intake_takes_in_every_image_that_the_server_has(intake: ModuleType) -> None:
    with intake.served() as proxy:
        found = {way: [intake.measured(way, 30, 3, 4, proxy)] for way in ("whole", "fetch")}
    assert all(0 < each["seconds"] < 600 and each["peak_mib"] > 50 for [each] in found.values())
    lines = intake.lines_of(30, found | {"plain": found["fetch"], "no checks": found["whole"]})
    assert all(set(line) == {"name", "ours", "theirs", "ratio", "target"} for line in lines)
    [whole] = [line for line in lines if line["name"] == "intake/whole/30 images/wall_s"]
    assert whole["target"] == 0.9
    assert whole["ratio"] == pytest.approx(
        found["fetch"][0]["seconds"] / found["whole"][0]["seconds"], abs=0.01
    )


def test_intake_refuses_figures_when_images_are_missing(
    intake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(intake.WAYS, "whole", lambda *a: 29)
    with pytest.raises(SystemExit, match="29 of 30 images came"):
        intake._one("whole", 30, 3, 4, 1000, "http://127.0.0.1:9")


def test_each_check_has_its_price(tmp_path: Path) -> None:
    out = tmp_path / "lines.json"
    subprocess.run(
        [
            *(sys.executable, str(FOLDER / "intake_checks.py")),
            *("--images", "20", "--known", "500", "--json", str(out)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = json.loads(out.read_text())
    assert len({line["check"] for line in lines}) == 9
    assert all(line["us a picture"] > 0 for line in lines)


def test_alike_counts_what_it_finds(tmp_path: Path) -> None:
    drawn = np.random.default_rng(3)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        patches = Image.fromarray(drawn.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        picture = patches.resize((200, 200), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:02d}.jpg")
    picture.resize((90, 90)).save(folder / "copy.jpg")
    out = tmp_path / "lines.json"
    subprocess.run(
        [
            *(sys.executable, str(FOLDER / "alike.py"), "--images", str(folder)),
            *("--known", "5000", "--json", str(out)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    speed, *changes, pairs = json.loads(out.read_text())
    assert speed["ms to look a picture up"] > 0
    assert len(changes) == 12
    assert all(line["pictures"] == 13 and line["recall"] > 0.5 for line in changes)
    assert (pairs["pairs"], pairs["hits"], pairs["such as"]) == (78, 1, [["copy.jpg", "11.jpg"]])


def test_alt_texts_are_counted_by_rule(tmp_path: Path) -> None:
    texts, english = tmp_path / "texts.txt", tmp_path / "english.txt"
    texts.write_text(
        "DSC_1.JPG\na@b.example\nZwei Hunde spielen mit einem Ball am Strand\n\nx &amp; y z\n"
    )
    english.write_text("two dogs playing with a ball on the beach\n")
    out = tmp_path / "lines.json"
    subprocess.run(
        [
            *(sys.executable, str(FOLDER / "alt_texts.py"), "--texts", str(texts)),
            *("--english", str(english), "--rows", "7000", "--images", "2000", "--json", str(out)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    remembered, *rules, taken, placeholders = json.loads(out.read_text())
    met = {line["rule"]: line["meet it"] for line in rules}
    assert (met["file_name"], met["e_mail"], met["language, [en]"], met["phone"]) == (1, 1, 1, 0)
    assert (met["masked"], met["repaired"]) == (1, 1)
    assert all(line["us"] > 0 for line in rules)
    assert taken == {"english texts": 1, "taken for another language": 0}
    assert (placeholders["rows"], placeholders["placeholders"]) == (7000, 7)
    assert remembered["images"] == 2000
    assert remembered["us to look one up"] > 0
