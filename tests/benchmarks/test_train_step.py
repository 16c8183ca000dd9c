import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The benchmark's modules, which import each other by name."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("equal_work", "our_step", "plain_blip")
    equal_work, our_step, plain_blip = (importlib.import_module(name) for name in names)
    return equal_work, our_step, plain_blip


@pytest.fixture
def check(modules: tuple[ModuleType, ModuleType, ModuleType]) -> Any:
    """Checks a baseline against our step."""
    from blip_core import MEDTokenizer

    equal_work, our_step, _ = modules
    tokenizer = MEDTokenizer.train([" ".join(our_step.WORDS)] * 3, 400)
    return lambda plain: equal_work.check_equal_work(tokenizer, torch.device("cpu"), plain)


def test_train_step_writes_a_line_per_baseline_and_clock_when_quick(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    arguments = ["--quick", "--preset", "tiny", "--queue-size", "64", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "train_step.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "same work" in done.stdout
    lines = json.loads(path.read_text(encoding="utf-8"))
    assert [line["name"] for line in lines] == [
        f"train_step/{dtype}/{baseline}/{clock}_s"
        for dtype in ("bfloat16", "float32")
        for baseline in ("padded", "longest")
        for clock in ("cpu", "wall")
    ]
    for line in lines:
        assert list(line) == ["name", "ours", "theirs", "ratio", "target"]
        assert line["ratio"] == pytest.approx(line["theirs"] / line["ours"], rel=0.05)
        assert line["target"] is None, "targets are the whole base preset's"


def test_our_step_computes_in_the_type_it_is_asked_for_compiled_or_not(
    modules: tuple[ModuleType, ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from blip_core import MEDConfig, MEDTokenizer, build_model

    _, our_step, plain_blip = modules
    tokenizer = MEDTokenizer.train([" ".join(our_step.WORDS)] * 3, 400)
    config = MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size)
    recipe = plain_blip.Recipe(queue_size=64)
    ours = our_step.OurStep(build_model(config, seed=0), tokenizer, recipe, torch.device("cpu"))
    kinds, calls = [], []
    ours.model.vision.blocks[0].mlp.fc1.register_forward_hook(
        lambda _, __, output: kinds.append(output.dtype)
    )
    for block in ours.model.vision.blocks:

        def compiled(hidden: Tensor, block: Any = block) -> Tensor:
            calls.append(block)
            return block._call_impl(hidden)

        monkeypatch.setattr(
            block, "compile", lambda b=block, c=compiled: setattr(b, "_compiled_call_impl", c)
        )
    ours.compile()
    batch = our_step.make_batch(config, 2, 8, 0)
    for dtype, use in (("bfloat16", False), ("float32", True)):
        ours(batch, dtype, compiled=use)
        assert set(kinds) == {getattr(torch, dtype)}
        assert len(calls) == (len(ours.model.vision.blocks) if use else 0)
        kinds.clear()


def test_targets_are_on_the_clock_that_is_judged(
    modules: tuple[ModuleType, ModuleType, ModuleType],
) -> None:
    train_step = importlib.import_module("train_step")
    options = train_step.parse([])
    seconds = {"ours": 2.0, "padded": 4.0, "longest": 3.0}
    lines = train_step.compare(
        "bfloat16", {name: {"cpu": [s], "wall": [s]} for name, s in seconds.items()}, options
    )
    assert [(line["ratio"], line["target"]) for line in lines] == [
        (2.0, 1.6),
        (2.0, None),
        (1.5, 1.2),
        (1.5, None),
    ]


def test_equal_work_is_found_when_both_do_the_same(
    check: Any, modules: tuple[ModuleType, ModuleType, ModuleType]
) -> None:
    assert check(modules[2].PlainBLIP) < 1e-4


@pytest.mark.parametrize("broken", ["itc", "itm", "lm", "teacher", "gradient"])
def test_equal_work_is_refused_when_the_baseline_does_less(
    check: Any, modules: tuple[ModuleType, ModuleType, ModuleType], broken: str
) -> None:
    class Broken(modules[2].PlainBLIP):  # type: ignore[misc]
        def losses(self, *args: Any) -> Tensor:
            if broken == "teacher":
                self.twins = [(twin, twin) for _, twin in self.twins]  # follows nobody
            losses: Tensor = super().losses(*args)
            factor = torch.tensor(
                [0.99 if broken == name else 1.0 for name in ("itc", "itm", "lm")]
            )
            return losses * factor

        def match(self, sim_i2t: Tensor, sim_t2i: Tensor, embeds: Tensor, *rest: Tensor) -> Tensor:
            embeds = embeds.detach() if broken == "gradient" else embeds
            loss: Tensor = super().match(sim_i2t, sim_t2i, embeds, *rest)
            return loss

    with pytest.raises(SystemExit, match="not the same work"):
        check(Broken)
