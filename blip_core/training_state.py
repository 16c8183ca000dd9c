"""What a training run leaves on disk, so that a kill at any instant costs at most the steps since a checkpoint.

    folder/run.json         the run's settings and the hash of its initial weights
    folder/history.jsonl    one line per log
    folder/step-000200/     model, optimizer and momentum safetensors, then state.json with their hashes
    folder/best-000150/     model.safetensors and state.json of the best evaluation, where one is asked for

A checkpoint is written under a temporary name, synced and renamed; the last few are kept. Of several ranks the
first one writes, and all read.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip_core.distributed import World
from blip_core.errors import CheckpointError, ConfigError, CorruptCheckpoint
from blip_core.split_tensors import gathered, split_like
from blip_core.vision import load_strict

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainingState:
    """The small part of a run's state; tensors lie beside it."""

    step: int = 0
    """Finished steps."""
    num_batches: int = 0
    """Batches read so far: where the order of the data goes on."""
    world_size: int = 1
    is_sharded: bool = False
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last history line."""
    best_step: int = 0
    """Step of the best evaluation; 0 before the first."""
    best_value: float | None = None
    num_worse: int = 0
    """Evaluations since the best one."""
    is_stopped: bool = False
    """Whether the run ended before its last step because nothing got better."""


class TrainingFolder:
    """The folder of one run, as one rank sees it."""

    def __init__(self, path: Path, *, num_kept: int = 2, world: World | None = None) -> None:
        self.path, self.num_kept, self.world = path, num_kept, world or World()
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob("_tmp-*") if self.world.is_first else ():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def check_settings(
        self,
        settings: Mapping[str, Any],
        model: nn.Module,
        completed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """Record the settings and the start of a new run, or refuse those of another one.

        `completed` adds to settings that an older version recorded what they did not name.
        """
        if not self.world.is_first:
            return
        wanted = json.loads(json.dumps(dict(settings)))
        wanted["initial_weights"] = hash_tensors(model.state_dict())
        path = self.path / "run.json"
        if not path.is_file():
            write_synced(path, json.dumps(wanted, indent=1, sort_keys=True).encode())
            return
        try:
            found = json.loads(json.dumps(completed(json.loads(path.read_text()))))
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
        """Write the checkpoint of `state.step`, then delete all but the last few; ranks wait for it.

        All ranks call this. The files are the same whether tensors are split over the ranks or not.
        """
        parts = {
            "model": model.state_dict(),
            "optimizer": _optimizer_tensors(model, optimizer),
            "momentum": momentum.state_dict() if momentum is not None else {},
        }
        is_first = self.world.is_first
        tensors = {part: gathered(values, keep=is_first) for part, values in parts.items()}
        if is_first:
            self._write(f"step-{state.step:06d}", tensors, asdict(state))
            for old in self._numbered("step-")[self.num_kept :]:
                shutil.rmtree(old)
            self._drop_unneeded_best()
        self.world.wait()

    def save_best(self, step: int, model: nn.Module) -> None:
        """Write the model of the best evaluation, of step `step`."""
        if self.world.is_first:
            self._write(f"best-{step:06d}", {"model": model.state_dict()}, {"step": step})

    def load_best(self, step: int, model: nn.Module) -> None:
        """Load what `save_best` wrote; raises CorruptCheckpoint naming a damaged file."""
        self.world.wait()
        path = self.path / f"best-{step:06d}"
        _, tensors = _read_checkpoint(path)
        load_strict(model, tensors["model"], str(path))

    def load_latest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, momentum: nn.Module | None
    ) -> TrainingState:
        """Load the newest sound checkpoint; a damaged one is named in the log and set aside."""
        step, found = 0, None
        if self.world.is_first and (found := self._newest_sound()) is not None:
            step = found[0].step
        step = self.world.from_first(step)
        if step == 0:
            return TrainingState()
        path = self.path / f"step-{step:06d}"
        state, tensors = found if found is not None else _read_checkpoint(path)
        load_strict(model, tensors["model"], str(path))
        _load_optimizer(model, optimizer, tensors["optimizer"], path)
        if momentum is not None:
            load_strict(momentum, tensors["momentum"], str(path))
        return state

    def _newest_sound(self) -> tuple[TrainingState, dict[str, dict[str, Tensor]]] | None:
        for path in self._numbered("step-"):
            try:
                return _read_checkpoint(path)
            except CorruptCheckpoint as err:
                aside = path.with_name(f"corrupt-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                logger.warning("%s; set aside as %s", err, aside.name)
        return None

    def _write(
        self, name: str, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Write a folder of safetensors and state.json, whole or not at all."""
        temporary, target = self.path / f"_tmp-{name}", self.path / name
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        hashes = {}
        for part, values in tensors.items():
            path = temporary / f"{part}.safetensors"
            save_file({key: value.contiguous() for key, value in values.items()}, str(path))
            hashes[path.name] = hash_file(path)
            _sync(path)
        text = json.dumps({**state, "files": hashes}, indent=1)
        write_synced(temporary / "state.json", text.encode())
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(self.path)

    def _drop_unneeded_best(self) -> None:
        """Delete best models that no kept checkpoint speaks of."""
        needed = set()
        for path in self._numbered("step-"):
            needed.add(json.loads((path / "state.json").read_text()).get("best_step"))
        for old in self._numbered("best-"):
            if int(old.name[5:]) not in needed:
                shutil.rmtree(old)

    def append_history(self, line: Mapping[str, Any]) -> None:
        """Add one line to history.jsonl."""
        if not self.world.is_first:
            return
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
        if not self.world.is_first:
            return
        kept = [line for line in self.read_history() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_synced(self.path / "history.jsonl", text.encode())

    def _numbered(self, prefix: str) -> list[Path]:
        """Return the folders `prefix` and a step, newest first."""
        found = [path for path in self.path.glob(f"{prefix}*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _read_checkpoint(path: Path) -> tuple[TrainingState, dict[str, dict[str, Tensor]]]:
    try:
        values = json.loads((path / "state.json").read_text())
        hashes = values.pop("files")
        values.setdefault("num_batches", values["step"])  # older versions: one batch a step,
        values.get("window", {}).pop("num_images", None)  # and images counted here
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
        optimizer.state[parameter][key] = split_like(parameter, value)


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
