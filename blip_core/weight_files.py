"""Reading and writing files of weights: safetensors, one or sharded, and `.pth` without pickled code."""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_core.errors import CheckpointError, CorruptCheckpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FindFile = Callable[[str], Path | None]
"""A file's name within a model -> where it is, or None."""


def read_safetensors(path: str | Path, what: str = "weights") -> dict[str, Tensor]:
    """Read one file. Raises CheckpointError when absent, CorruptCheckpoint when damaged, naming it."""
    try:
        return dict(load_file(str(path)))
    except FileNotFoundError as err:
        raise CheckpointError(f"no {what} at {path}") from err
    except (SafetensorError, OSError) as err:
        raise CorruptCheckpoint(
            f"{what} {path} cannot be read: {err}; the file is cut or damaged, fetch it again"
        ) from err


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None
) -> None:
    """Write one file, whole or not at all; the same tensors give the same bytes."""
    plain = {name: tensors[name].detach().cpu() for name in sorted(tensors)}
    plain = {name: _apart(tensor) for name, tensor in plain.items()}
    temporary = path.with_name(f"_tmp-{path.name}")
    save_file(plain, str(temporary), metadata=metadata)
    temporary.replace(path)


def _apart(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, as the format wants it."""
    is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)


def read_sharded(find: FindFile, where: str) -> dict[str, Tensor]:
    """Read `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Every tensor must lie in the shard that the index names, and no other beside it. Raises CheckpointError.
    """
    path = find(WEIGHTS)
    if path is not None:
        return read_safetensors(path)
    index = find(INDEX)
    if index is None:
        raise CheckpointError(
            f"no weights at {where}: neither {WEIGHTS} nor {INDEX}; "
            "older formats must be converted to safetensors first"
        )
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {str(name): str(shard) for name, shard in dict(raw).items()}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CorruptCheckpoint(f"{index} cannot be read: {err!r}") from err
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CorruptCheckpoint(f"{index} names {shard}, which is not beside it")
        path = find(shard)
        if path is None:
            raise CheckpointError(f"{index} names {shard}, which is not there")
        found = read_safetensors(path)
        wanted = {name for name, file in weight_map.items() if file == shard}
        if set(found) != wanted:
            raise CorruptCheckpoint(
                f"{path} does not hold what {index.name} says; differing: "
                f"{listed(sorted(set(found) ^ wanted))}"
            )
        tensors |= found
    return tensors


def read_pth(path: str | Path) -> dict[str, Any]:
    """Read a `.pth` dictionary with `weights_only=True`. Raises CheckpointError naming the file."""
    try:
        values = torch.load(str(path), map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise CheckpointError(f"no weights at {path}") from err
    except pickle.UnpicklingError as err:
        if "weights_only" not in str(err).lower():
            raise CorruptCheckpoint(f"{path} cannot be read: {err}") from err
        raise CheckpointError(
            f"{path} needs pickled code to be read, which is refused: it could run anything. Where you "
            "trust it, keep its tensors alone: torch.save({'model': state_dict}, path)"
        ) from err
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as err:
        raise CorruptCheckpoint(f"{path} cannot be read: {err}; fetch it again") from err
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a dictionary")
    return values


def listed(names: list[str], most: int = 8) -> str:
    """Join names for a message, cut after `most` with the number of those left out."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
