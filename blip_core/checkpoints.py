"""Models on disk: weights, configuration and tokenizer in one folder, named by the hash of the weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from blip_core import hf
from blip_core.config import MEDConfig, require
from blip_core.errors import CheckpointError, ConfigError, CorruptCheckpoint
from blip_core.med import MED
from blip_core.official import load_official
from blip_core.tokenizer import MEDTokenizer, require_vocabulary
from blip_core.training_state import hash_file, write_synced
from blip_core.transforms import Triple
from blip_core.vision import load_strict, resize_positions
from blip_core.weight_files import WEIGHTS, read_safetensors, write_safetensors

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
    return _write_own(model, tokenizer, Path(folder))


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
    tokenizer = MEDTokenizer.from_pretrained(folder)
    require_vocabulary(config.text, tokenizer)
    model = _read_weights(folder, config, image_size_px)
    return LoadedModel(model.to(device), tokenizer, model_id)


def read_pretrained(path_or_repo: str | Path, *, image_size_px: int | None = None) -> MED:
    """See `MED.from_pretrained`."""
    if Path(path_or_repo).suffix in (".pth", ".pt"):
        return load_official(path_or_repo, image_size_px=image_size_px).model
    find = hf.finder(path_or_repo)
    where = str(path_or_repo)
    path = find(CONFIG)
    if path is None:
        raise CheckpointError(f"no model at {where}: {CONFIG} is not there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{path} cannot be read: {err}") from err
    if isinstance(values, dict) and "model_type" in values:
        return hf.load_hf(values, find, where, image_size_px=image_size_px)
    if find(WEIGHTS) is None:
        raise CheckpointError(f"no model at {where}: {WEIGHTS} is not there")
    return _read_weights(
        path.parent, _read_config(path.parent, model_id_of(path.parent)), image_size_px
    )


def write_pretrained(
    model: MED,
    path: str | Path,
    layout: str,
    tokenizer: MEDTokenizer | None,
    pixel_mean: Triple,
    pixel_std: Triple,
) -> None:
    """See `MED.save_pretrained`."""
    known = ("own", *hf.LAYOUTS)
    require(layout in known, f"layout must be one of {', '.join(known)}; got {layout!r}")
    if tokenizer is not None:
        require_vocabulary(model.config.text, tokenizer)
    if layout == "own":
        _write_own(model, tokenizer, Path(path))
        return
    hf.require_layout(model, layout)
    if tokenizer is not None:
        hf.save_processor(
            tokenizer, Path(path), model.config.vision.image_size_px, pixel_mean, pixel_std
        )
    hf.save_hf(model, Path(path), layout, tokenizer)  # config.json last: the folder is whole then


def _write_own(model: MED, tokenizer: MEDTokenizer | None, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(model.state_dict(), folder / WEIGHTS, metadata=None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    model_id = model_id_of(folder)
    config = {"model": model.config.to_dict(), "model_id": model_id}
    write_synced(folder / CONFIG, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())
    return model_id


def _read_weights(folder: Path, config: MEDConfig, image_size_px: int | None) -> MED:
    state = read_safetensors(folder / WEIGHTS)
    if image_size_px is not None:
        config = config.at_image_size(image_size_px)
        if _POSITIONS in state:
            num_patches = config.vision.num_tokens - 1
            state[_POSITIONS] = resize_positions(state[_POSITIONS], num_patches)
    model = MED(config)
    load_strict(model, state, str(folder / WEIGHTS))
    return model.eval()


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
