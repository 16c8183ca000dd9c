import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_core import MED, CheckpointError, CorruptCheckpoint, MEDTokenizer, load_model, save_model


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
