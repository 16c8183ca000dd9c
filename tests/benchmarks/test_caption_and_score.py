import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from blip_core import build_model

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--quick", "--preset", "tiny", "--image-size", "32", "--threads", "1"]


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("caption.py", ["vision", "nucleus", "beam3", "five"]),
        ("score.py", ["2 texts", "2 texts vision once", "6 texts", "6 texts vision once"]),
    ],
)
def test_benchmarks_write_a_line_for_each_comparison_and_clock(
    tmp_path: Path, script: str, names: list[str]
) -> None:
    path = tmp_path / "lines.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *TINY, "--json", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text(encoding="utf-8"))
    assert len(lines) == 2 * 2 * len(names), "two number types, two clocks"
    for line in lines:
        assert list(line) == ["name", "ours", "theirs", "ratio", "target"]
        assert any(all(word in line["name"] for word in name.split()) for name in names)
        assert line["target"] is None, "targets are the whole base preset's"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Loads both sides of a benchmark on tiny weights."""
    monkeypatch.syspath_prepend(FOLDER)
    options = SimpleNamespace(batch_size=2, num_new=4, image_size=32, device="cpu", preset="tiny")

    def sides(script: str, layout: str, *arguments: int) -> tuple[ModuleType, object]:
        module = importlib.import_module(script)
        common = importlib.import_module("side_by_side")
        model = build_model(common.measured_config(options), seed=0)
        with torch.no_grad():
            for name, parameter in model.text.named_parameters():
                if parameter.ndim == 2 and "embeddings" not in name:
                    parameter.mul_(8.0)
            if "retrieval" in layout:
                model.itm_head.weight.mul_(30.0)
        model.save_pretrained(tmp_path, layout)
        return module, module.Sides.load(tmp_path, "float32", *arguments, options)

    return sides


@torch.inference_mode()
def test_captions_of_another_model_are_not_the_same_work(load) -> None:  # type: ignore[no-untyped-def]
    module, sides = load("caption", "hf-captioning")
    module.check_equal(sides)
    sides.theirs.text_decoder.bert.embeddings.word_embeddings.weight.mul_(-1.0)
    with pytest.raises(SystemExit, match="not the same work: greedy gives"):
        module.check_equal(sides)


@torch.inference_mode()
def test_scores_of_another_model_are_not_the_same_work(load) -> None:  # type: ignore[no-untyped-def]
    module, sides = load("score", "hf-retrieval", 2)
    module.check_equal(sides)
    sides.theirs.itm_head.weight.mul_(-1.0)
    with pytest.raises(SystemExit, match="probabilities differ by"):
        module.check_equal(sides)
