"""Models on disk: weights, configuration and tokenizer in one folder, named by the hash of the weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blip_core.config import MEDConfig
from blip_core.errors import CheckpointError, ConfigError, CorruptCheckpoint
from blip_core.med import MED
from blip_core.tokenizer import MEDTokenizer
from blip_core.training_state import hash_file, write_synced
from blip_core.vision import load_strict, resize_positions

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_POSITIONS = "vision.pos_embed"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model as it was saved."""

    model: MED
    tokenizer: MEDTokenizer
    model_id: str
    """First 32 hex digits of sha256 of the weights file."""


def save_model(model: MED, tokenizer: MEDTokenizer, folder: str | Path) -> str:
    """Write model.safetensors, config.json and tokenizer.json into `folder`; returns the model id.

    The same weights always give the same bytes, and so the same id.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    temporary = folder / f"_tmp-{WEIGHTS}"
    save_file(tensors, str(temporary))
    temporary.replace(folder / WEIGHTS)
    tokenizer.save_pretrained(folder)
    model_id = model_id_of(folder)
    config = {"model": model.config.to_dict(), "model_id": model_id}
    write_synced(folder / CONFIG, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())
    return model_id


def model_id_of(folder: str | Path) -> str:
    """Return the id of the weights in a folder."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"no model at {folder}: {WEIGHTS} is not there")
    return hash_file(path)[:32]


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", *, image_size_px: int | None = None
) -> LoadedModel:
    """Read a folder that `save_model` wrote, in evaluation mode.

    Every key must fit. `image_size_px` builds the model for another image size and resamples the position
    embeddings. Raises CorruptCheckpoint naming the file when bytes are not those that were saved.
    """
    folder = Path(folder)
    model_id = model_id_of(folder)
    config = _read_config(folder, model_id)
    try:
        state = load_file(str(folder / WEIGHTS))
    except (SafetensorError, OSError) as err:
        raise CorruptCheckpoint(f"{folder / WEIGHTS} cannot be read: {err}") from err
    if image_size_px is not None:
        values = config.to_dict()
        values["vision"]["image_size_px"] = image_size_px
        config = MEDConfig.from_dict(values)
        if _POSITIONS in state:
            num_patches = config.vision.num_tokens - 1
            state[_POSITIONS] = resize_positions(state[_POSITIONS], num_patches)
    model = MED(config)
    load_strict(model, state, str(folder / WEIGHTS))
    return LoadedModel(model.to(device).eval(), MEDTokenizer.from_pretrained(folder), model_id)


def _read_config(folder: Path, model_id: str) -> MEDConfig:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
        saved_id, config = values["model_id"], MEDConfig.from_dict(values["model"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        if isinstance(err, ConfigError):
            raise CheckpointError(f"{path}: {err}") from err
        raise CorruptCheckpoint(f"{path} cannot be read: {err}") from err
    if saved_id != model_id:
        raise CorruptCheckpoint(
            f"{folder / WEIGHTS} is damaged: its hash is {model_id}, saved was {saved_id}"
        )
    return config
