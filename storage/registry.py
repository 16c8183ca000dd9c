"""The registry of models: each is a folder named by its weights, with its lineage beside them.

`champion.json` names the model that the next round starts from and keeps every earlier one.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from storage import layout
from storage.errors import ConfigError, CorruptData
from storage.fingerprint import basis_of, canonical
from storage.ids import ID_LENGTH
from storage.lake import Lake
from storage.tables import (
    commit_part,
    committed_part,
    drop_part,
    file_sha256,
    list_parts,
    read_part,
)

WEIGHTS = "model.safetensors"
ARM = "arm"
"""A model of a comparison of policies: a MED that no round starts from and that is never champion."""
ROLES = ("med", "captioner", "filter", ARM)
Action = Literal["gate", "promote", "rollback"]
"""Who changed the champion: a round's gate, or a person."""
FOREIGN_ROLES = ("foreign_captioner", "foreign_scorer")
"""Models that were not trained here: their weights stay where they are, and `path` is a reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """A registered model."""

    model_id: str
    role: str
    round: int
    path: str
    """Its folder, relative to the lake; of a foreign model the reference, such as hf:NAME."""

    @property
    def is_foreign(self) -> bool:
        """Whether it was trained elsewhere and its files are not in the lake."""
        return self.role in FOREIGN_ROLES


def register(
    lake: Lake,
    local_folder: Path,
    *,
    role: str,
    round: int,
    parent_id: str | None,
    trained_on: str | None,
    config: Mapping[str, Any],
) -> ModelRef:
    """Copy a saved model into the lake and record where it comes from.

    `local_folder` holds model.safetensors; the model id is the hash of that file. Registering
    the same weights again for another role or round adds a row, not a copy.
    """
    if role not in ROLES:
        raise ConfigError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    weights = local_folder / WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"{local_folder} holds no {WEIGHTS}; save a model there first")
    model_id = file_sha256(weights)[:ID_LENGTH]
    record = {
        "model_id": model_id,
        "role": role,
        "parent_id": parent_id,
        "round": round,
        "path": layout.model_dir(model_id),
        "trained_on": trained_on,
        "config": canonical(config),
    }
    _upload(lake, local_folder, model_id, record)
    return record_model(lake, record)


def register_foreign(
    lake: Lake, model_id: str, *, role: str, round: int, reference: str, config: Mapping[str, Any]
) -> ModelRef:
    """Record a model that was trained elsewhere; its weights stay where `reference` says.

    `model_id` is a hash of its weights. Registering it again changes nothing.
    """
    if role not in FOREIGN_ROLES:
        raise ConfigError(f"role must be one of {', '.join(FOREIGN_ROLES)}, got {role!r}")
    record = {
        "model_id": model_id,
        "role": role,
        "parent_id": None,
        "round": round,
        "path": reference,
        "trained_on": None,
        "config": canonical(config),
    }
    _write_lineage(lake, model_id, record)
    return record_model(lake, record)


def record_model(lake: Lake, record: Mapping[str, Any]) -> ModelRef:
    """Commit a model's row, unless it is the newest of its role and round already."""
    model_id, role, round = record["model_id"], record["role"], record["round"]
    name = f"{role}-{model_id}"
    basis = basis_of("register", 1, record, [record["trained_on"] or ""], model_id)
    known = committed_part(lake, "models", name, round=round, basis=basis, on_stale="rebuild")
    newest = find(lake, role, round)
    if known is None or newest is None or newest.model_id != model_id:
        row = {**record, "created_at": datetime.now(UTC)}
        commit_part(lake, "models", name, pa.Table.from_pylist([row]), round=round, basis=basis)
    return ModelRef(model_id=model_id, role=role, round=round, path=record["path"])


def resolve(lake: Lake, model_id: str) -> ModelRef:
    """The model of that id, or of an unambiguous beginning of at least 6 digits.

    One that a round made and an arm of a comparison made again is the round's.
    """
    rows = [r for r in list_models(lake) if r.model_id.startswith(model_id)]
    known = {r.model_id for r in rows}
    if len(known) != 1 or len(model_id) < 6:
        found = f"{len(known)} models begin so" if known else "there is none"
        raise ConfigError(
            f"model {model_id!r} in {lake.uri}: {found}; SELECT model_id, role, round FROM models"
        )
    return min(rows, key=lambda ref: ref.role == ARM)


def find(lake: Lake, role: str, round: int) -> ModelRef | None:
    """The model of a role that a round made; after a rebuild there are several, the newest counts."""
    columns = ["model_id", "role", "round", "path", "created_at"]
    rows = [
        row
        for ref in list_parts(lake, "models", round)
        for row in read_part(lake, ref, columns).to_pylist()
        if row["role"] == role
    ]
    if not rows:
        return None
    newest = max(rows, key=lambda row: (row["created_at"], row["model_id"]))
    return ModelRef(**{name: newest[name] for name in columns[:-1]})


def list_models(lake: Lake, round: int | None = None) -> list[ModelRef]:
    """All registered models, by round, role and id."""
    columns = ["model_id", "role", "round", "path"]
    rows = [
        ModelRef(**row)
        for ref in list_parts(lake, "models", round)
        for row in read_part(lake, ref, columns).to_pylist()
    ]
    return sorted(rows, key=lambda r: (r.round, r.role, r.model_id))


def local_folder(lake: Lake, ref: ModelRef) -> Path:
    """A folder on this machine with the model's files; CorruptData when the weights differ.

    For a local lake it is the folder itself; otherwise a checked copy in scratch. ConfigError for a foreign
    model, whose files are not in the lake.
    """
    if ref.is_foreign:
        raise ConfigError(f"model {ref.model_id} is {ref.path}: its files are not in the lake")
    folder = lake.root.local_path(ref.path)
    if folder is None:
        folder = lake.scratch("models", ref.model_id)
        for name in lake.root.list(ref.path):
            if not (folder / name).exists():
                lake.root.get_file(f"{ref.path}/{name}", folder / name)
    weights = folder / WEIGHTS
    if not weights.is_file() or file_sha256(weights)[:ID_LENGTH] != ref.model_id:
        raise CorruptData(
            f"checkpoint {folder}: {WEIGHTS} is not the file that was registered as "
            f"{ref.model_id}; run `bootstrap repair`, then the same command again to train it anew"
        )
    return folder


def forget_arm(lake: Lake, ref: ModelRef) -> bool:
    """Remove the weights of an arm whose figures are known; False where a round has the same model, which stays.

    Its row in `arms` stays, and says what it was trained on.
    """
    if ref.role != ARM:
        raise ConfigError(f"model {ref.model_id} is a {ref.role}, not an arm of a comparison")
    rows = [part for part in list_parts(lake, "models") if part.name.endswith(ref.model_id)]
    for part in rows:
        if part.name.startswith(f"{ARM}-"):
            drop_part(lake, part)
    if any(not part.name.startswith(f"{ARM}-") for part in rows):
        return False
    lake.root.remove(ref.path)
    return True


def arm_path(model_id: str) -> str:
    """Where an arm's model lies, or lay before it was removed."""
    return layout.model_dir(model_id)


def lineage_of(lake: Lake, model_id: str) -> dict[str, Any]:
    """Where a model comes from: parent, round, training set, configuration."""
    record: dict[str, Any] = json.loads(lake.root.read_bytes(layout.lineage(model_id)))
    return record


def promotions(lake: Lake) -> list[dict[str, Any]]:
    """The champion's history, the oldest first: model_id, round, why; action and at where it is known."""
    state = _champion_state(lake)
    return [dict(entry) for entry in state["history"]] if state else []


def last_promotion(lake: Lake) -> dict[str, Any] | None:
    """The last entry of the champion's history."""
    history = promotions(lake)
    return history[-1] if history else None


def champion(lake: Lake) -> ModelRef | None:
    """The model that the next round starts from, None before the first promotion."""
    state = _champion_state(lake)
    if state is None:
        return None
    now = state["history"][-1]
    models = [r for r in list_models(lake) if r.model_id == now["model_id"]]
    if not models:
        raise CorruptData(
            f"{lake.uri}/{layout.CHAMPION} names model {now['model_id']}, which is not registered; "
            "run `bootstrap repair`"
        )
    return next((r for r in models if r.role == "med"), models[0])


def promote(
    lake: Lake, model_id: str, round: int, why: str, *, action: Action = "gate"
) -> ModelRef:
    """Make a registered model the champion; promoting it twice in a row for a round changes nothing.

    The history is only added to. `action` says who: a round's gate, or a person (`storage.by_hand`).
    """
    if not re.fullmatch(f"[0-9a-f]{{{ID_LENGTH}}}", model_id):
        raise ConfigError(f"model id {model_id!r} is not {ID_LENGTH} hex digits")
    ref = resolve(lake, model_id)
    if ref.role == ARM:
        raise ConfigError(
            f"model {model_id} of {lake.uri} is an arm of a comparison and never champion; to have a round "
            "with its policy, name it in decide.policy and run `bootstrap next-round`"
        )
    history = promotions(lake)
    entry = {"model_id": model_id, "round": round, "why": why, "action": action}
    last = history[-1] if history else {}
    same = ("model_id", "round", "why")
    if [last.get(name) for name in same] != [entry[name] for name in same]:
        entry["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        data = json.dumps({"history": [*history, entry]}, indent=2)
        lake.root.write_bytes(layout.CHAMPION, data.encode())
    return ref


def _champion_state(lake: Lake) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(lake.root.read_bytes(layout.CHAMPION))
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise CorruptData(
            f"{lake.uri}/{layout.CHAMPION} is not readable ({err}); remove it and promote a model "
            "of the last round"
        ) from err
    return state


def _upload(lake: Lake, local_folder: Path, model_id: str, record: Mapping[str, Any]) -> None:
    """Copy the files, then write the lineage; a model with a lineage is whole already."""
    if lake.root.exists(layout.lineage(model_id)):
        return
    for path in sorted(local_folder.iterdir()):
        if path.is_file() and path.name != "lineage.json":
            lake.root.put_file(path, layout.model_file(model_id, path.name))
    _write_lineage(lake, model_id, record)


def _write_lineage(lake: Lake, model_id: str, record: Mapping[str, Any]) -> None:
    if lake.root.exists(layout.lineage(model_id)):
        return
    data = json.dumps({**record, "config": json.loads(record["config"])}, indent=2, sort_keys=True)
    lake.root.write_bytes(layout.lineage(model_id), data.encode())
