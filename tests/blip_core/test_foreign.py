"""Loading other people's models: which they are, and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import foreign_models
import pytest
import torch
from transformers import BlipForConditionalGeneration, CLIPModel

from blip_core import CheckpointError
from blip_core.clip_scorer import CLIPScorer
from blip_core.foreign import foreign_model_id, load_whole, processing_id, read_config


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.clip(tmp_path_factory.mktemp("clip"))


def test_model_id_is_the_hash_of_the_weights_in_however_many_files(
    clip: Path, tmp_path: Path
) -> None:
    weights = (clip / "model.safetensors").read_bytes()
    assert foreign_model_id(clip) == hashlib.sha256(weights).hexdigest()[:32]
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    first = foreign_model_id(tmp_path)
    assert len(first) == 32
    assert first != foreign_model_id(clip)
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(bytes(data))
    assert foreign_model_id(tmp_path) != first
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"names {shards[0].name}, which is not there"):
        foreign_model_id(tmp_path)


def test_a_folder_of_both_libraries_has_an_id_for_each(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_model.safetensors").write_bytes(b"other")
    assert foreign_model_id(folder) == foreign_model_id(clip), "what transformers reads"
    assert foreign_model_id(folder, of_open_clip=True) != foreign_model_id(clip)


def test_processing_id_changes_with_the_tokenizer_and_not_with_a_readme(
    clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    (folder / "README.md").write_text("a model")
    assert processing_id(folder) == processing_id(clip)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 9}))
    assert processing_id(folder) != processing_id(clip)
    assert foreign_model_id(folder) == foreign_model_id(clip)


def test_weights_that_are_missing_or_do_not_fit_are_not_filled_in(
    clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    model = CLIPModel.from_pretrained(clip)
    state = model.state_dict()
    del state["visual_projection.weight"]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(CheckpointError, match=r"1 of its weights .*visual_projection\.weight"):
        load_whole(CLIPModel, folder, torch.float32)
    with pytest.raises(CheckpointError, match=f"{clip}.*"):
        load_whole(BlipForConditionalGeneration, clip, torch.float32)


def test_damaged_weights_are_an_error_that_names_the_folder(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"the model of .*clip cannot be loaded"):
        CLIPScorer(folder)


def test_code_that_comes_with_a_model_is_never_run(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    values = read_config(folder)
    values["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    values["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(CheckpointError, match="needs code of its own, which is never run here"):
        load_whole(_auto(), folder, torch.float32)


def _auto() -> type:
    from transformers import AutoModel

    return AutoModel


def test_folder_that_is_no_model_of_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {"preset": "nano"}}')
    with pytest.raises(CheckpointError, match="names no model_type"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        read_config(tmp_path / "absent" / "deep" / "model")
