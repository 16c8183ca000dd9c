"""A tiny real tokenizer, model and batch; everything is built in milliseconds."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip_core import MED, Batch, MEDConfig, MEDTokenizer, build_model

COLOURS = ("red", "green", "blue", "white")
SHAPES = ("circle", "square", "cross", "ring")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [f"a {colour} {shape} on the left" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> MEDTokenizer:
    return MEDTokenizer.train([*texts, "a picture of two"], vocab_size=120)


@pytest.fixture(scope="session")
def config(tokenizer: MEDTokenizer) -> MEDConfig:
    return MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size)


@pytest.fixture
def model(config: MEDConfig) -> MED:
    """Random, with weights large enough that outputs differ clearly."""
    built = build_model(config, seed=0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0 if name.startswith(("text", "lm_head")) else 1.0)
    return built.eval()


@pytest.fixture(scope="session")
def pixel_values() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batch(pixel_values: Tensor, texts: list[str]) -> Batch:
    return Batch(texts[:8], [f"image-{index}" for index in range(8)], pixel_values=pixel_values[:8])


SharedFile = Callable[[str], Path]


@pytest.fixture
def shared_file() -> SharedFile:
    """Finds real weights in $BOOTSTRAP_SHARED or the folder `shared` beside the checkout, or skips."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    folder = Path(os.environ.get("BOOTSTRAP_SHARED", beside))

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{name} is not in {folder}: set BOOTSTRAP_SHARED to where it is")
        return folder / name

    return find
