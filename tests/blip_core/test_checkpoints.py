import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_core import (
    MED,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    MEDConfig,
    MEDTokenizer,
    build_model,
    load_model,
    save_model,
)
from blip_core.config import Head


@pytest.fixture
def saved(model: MED, tokenizer: MEDTokenizer, tmp_path: Path) -> Path:
    save_model(model, tokenizer, tmp_path)
    return tmp_path


@torch.no_grad()
def test_a_loaded_model_computes_the_same_and_has_the_same_id(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, tmp_path: Path
) -> None:
    model_id = save_model(model, tokenizer, tmp_path / "first")
    loaded = load_model(tmp_path / "first")
    assert loaded.model_id == model_id
    assert len(model_id) == 32
    assert loaded.model.config == model.config
    assert torch.equal(loaded.model.encode_image(pixel_values), model.encode_image(pixel_values))
    assert loaded.tokenizer.vocab_size == tokenizer.vocab_size
    again = save_model(loaded.model, loaded.tokenizer, tmp_path / "second")
    assert again == model_id
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_other_weights_have_another_id(
    model: MED, tokenizer: MEDTokenizer, saved: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.itm_head.bias[0] += 1e-6
    assert save_model(model, tokenizer, tmp_path / "other") != load_model(saved).model_id


def test_a_changed_byte_is_found_and_the_file_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors is damaged"):
        load_model(saved)


def test_a_damaged_config_is_named(saved: Path) -> None:
    (saved / "config.json").write_text('{"model": {')
    with pytest.raises(CorruptCheckpoint, match=r"config.json cannot be read"):
        load_model(saved)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model at .*model.safetensors is not there"):
        load_model(tmp_path)


def test_keys_must_fit_strictly(saved: Path) -> None:
    from blip_core.checkpoints import model_id_of

    state = load_file(str(saved / "model.safetensors"))
    del state["itm_head.bias"]
    save_file(state, str(saved / "model.safetensors"))
    config = json.loads((saved / "config.json").read_text())
    config["model_id"] = model_id_of(saved)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"absent: itm_head.bias"):
        load_model(saved)


def test_loading_at_another_image_size_resizes_positions(saved: Path) -> None:
    loaded = load_model(saved, image_size_px=64)
    assert loaded.model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 32)


@pytest.mark.parametrize("heads", [("itc", "itm", "lm"), ("lm",), ("itc", "itm"), ()])
def test_a_model_without_a_tokenizer_comes_back_as_it_was(
    heads: tuple[Head, ...], pixel_values: Tensor, tmp_path: Path
) -> None:
    model = build_model(MEDConfig.preset("nano", heads=heads), seed=0).eval()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = MED.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    expected = model.state_dict()
    assert set(expected) == set(loaded.state_dict())
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())


def test_save_pretrained_with_a_tokenizer_is_save_model(
    model: MED, tokenizer: MEDTokenizer, saved: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "other", tokenizer=tokenizer)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "other" / name).read_bytes() == (saved / name).read_bytes()
    assert load_model(tmp_path / "other").model_id == load_model(saved).model_id


@torch.no_grad()
def test_from_pretrained_reads_what_a_run_saved_at_another_size(
    model: MED, saved: Path, pixel_values: Tensor
) -> None:
    loaded = MED.from_pretrained(saved)
    assert torch.equal(loaded.encode_image(pixel_values), model.encode_image(pixel_values))
    larger = MED.from_pretrained(saved, image_size_px=64)
    assert larger.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 32)
    with pytest.raises(ConfigError, match="image_size_px 40 must be a multiple of patch_size_px"):
        MED.from_pretrained(saved, image_size_px=40)


def test_from_pretrained_finds_a_changed_byte_and_absent_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors is damaged"):
        MED.from_pretrained(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is not there"):
        MED.from_pretrained(saved)


def test_a_tokenizer_of_another_model_is_refused(saved: Path, texts: list[str]) -> None:
    MEDTokenizer.train([*texts, "zebra quagga okapi"], vocab_size=200).save_pretrained(saved)
    with pytest.raises(
        ConfigError, match=r"tokenizer has \d+ ids, but the model's text.vocab_size"
    ):
        load_model(saved)
