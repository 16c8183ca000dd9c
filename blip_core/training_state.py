"""What a training run leaves on disk, so that a kill at any instant costs at most the steps since a checkpoint.

    folder/run.json         the run's settings and the hash of its initial weights
    folder/history.jsonl    one line per log
    folder/step-000200/     model, optimizer and momentum safetensors, then state.json with their hashes

A checkpoint is written under a temporary name, synced and renamed; the last two are kept.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip_core.errors import CheckpointError, ConfigError, CorruptCheckpoint
from blip_core.vision import load_strict

logger = logging.getLogger(__name__)

NUM_KEPT = 2


@dataclass(slots=True)
class TrainingState:
    """The small part of a run's state; tensors lie beside it."""

    step: int = 0
    """Finished steps."""
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last history line."""


class TrainingFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob("_tmp-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def check_settings(self, settings: Mapping[str, Any], model: nn.Module) -> None:
        """Record the settings and the start of a new run, or refuse those of another one."""
        wanted = json.loads(json.dumps(dict(settings)))
        wanted["initial_weights"] = hash_tensors(model.state_dict())
        path = self.path / "run.json"
        if not path.is_file():
            write_synced(path, json.dumps(wanted, indent=1, sort_keys=True).encode())
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as err:
            raise CorruptCheckpoint(f"{path} cannot be read: {err}; delete {self.path}") from err
        differing = list(differences(found, wanted))
        if differing:
            raise ConfigError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. "
                "Use the old value, or another folder"
            )

    def save(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        momentum: nn.Module | None,
    ) -> None:
        """Write the checkpoint of `state.step`, then delete all but the last two."""
        name = f"step-{state.step:06d}"
        tensors = {
            "model": model.state_dict(),
            "optimizer": _optimizer_tensors(model, optimizer),
            "momentum": momentum.state_dict() if momentum is not None else {},
        }
        temporary, target = self.path / f"_tmp-{name}", self.path / name
        temporary.mkdir()
        hashes = {}
        for part, values in tensors.items():
            path = temporary / f"{part}.safetensors"
            save_file({key: value.contiguous() for key, value in values.items()}, str(path))
            hashes[path.name] = hash_file(path)
            _sync(path)
        text = json.dumps(asdict(state) | {"files": hashes}, indent=1)
        write_synced(temporary / "state.json", text.encode())
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(self.path)
        for old in self._checkpoints()[NUM_KEPT:]:
            shutil.rmtree(old)

    def load_latest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, momentum: nn.Module | None
    ) -> TrainingState:
        """Load the newest sound checkpoint; a damaged one is named in the log and set aside."""
        for path in self._checkpoints():
            try:
                state, tensors = _read_checkpoint(path)
            except CorruptCheckpoint as err:
                aside = path.with_name(f"corrupt-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                logger.warning("%s; set aside as %s", err, aside.name)
                continue
            load_strict(model, tensors["model"], str(path))
            _load_optimizer(model, optimizer, tensors["optimizer"], path)
            if momentum is not None:
                load_strict(momentum, tensors["momentum"], str(path))
            return state
        return TrainingState()

    def append_history(self, line: Mapping[str, Any]) -> None:
        """Add one line to history.jsonl."""
        with (self.path / "history.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_history(self) -> list[dict[str, Any]]:
        """Return all whole lines of history.jsonl; a line cut by a kill is left out."""
        path = self.path / "history.jsonl"
        lines = []
        for text in path.read_text().splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                logger.warning("%s: a line cut short is left out", path)
        return lines

    def drop_history_after(self, step: int) -> None:
        """Forget lines of steps that will be done again."""
        kept = [line for line in self.read_history() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_synced(self.path / "history.jsonl", text.encode())

    def _checkpoints(self) -> list[Path]:
        """Return checkpoint folders, newest first."""
        found = [path for path in self.path.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _read_checkpoint(path: Path) -> tuple[TrainingState, dict[str, dict[str, Tensor]]]:
    try:
        values = json.loads((path / "state.json").read_text())
        hashes = values.pop("files")
        state = TrainingState(**values)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CorruptCheckpoint(f"checkpoint {path} has no readable state.json: {err}") from err
    tensors = {}
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or hash_file(file) != expected:
            raise CorruptCheckpoint(f"checkpoint file {file} is absent or damaged")
        try:
            tensors[file.stem] = load_file(str(file))
        except SafetensorError as err:
            raise CorruptCheckpoint(f"checkpoint file {file} cannot be read: {err}") from err
    return state, tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}:{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        key, _, parameter_name = name.partition(":")
        if parameter_name not in parameters:
            raise CheckpointError(f"{path}: optimizer state of unknown parameter {parameter_name}")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = value.to(parameter.device)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Name every field in which two nested mappings differ, as `train.steps 600 -> 800`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(set(old) | set(new)):
            name = f"{where}.{key}" if where else str(key)
            found += differences(old.get(key), new.get(key), name)
        return found
    return [] if old == new else [f"{where} {old} -> {new}"]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 32 hex digits of sha256 over names and values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def hash_file(path: Path) -> str:
    """Return sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Replace a file by `data` in one step, synced to disk."""
    temporary = path.with_name(f"_tmp-{path.name}")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
