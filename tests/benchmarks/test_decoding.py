"""The benchmark of decoding gives every way the same pictures and the same shape of tensor."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("decoding")


def test_every_way_makes_the_tensor_of_the_same_picture(decoding: ModuleType) -> None:
    (data,) = decoding.jpegs((400, 300), 1, None)
    tensors = {name: decode(data) for name, decode in decoding.ways(64).items()}
    assert set(tensors) == {"ours", "whole", "pillow", "theirs"}
    for name, tensor in tensors.items():
        assert tensor.shape == (3, 64, 64)
        assert (tensor - tensors["pillow"]).abs().mean() < 0.05, name
    assert not torch.equal(tensors["ours"], tensors["whole"])
    assert 0 < decoding.change([data], 64) < 5


def test_rates_are_images_a_second(decoding: ModuleType) -> None:
    found = decoding.rates(decoding.jpegs((160, 120), 2, None), 32, 1)
    assert all(1 < rate < 100_000 for rate in found.values())
