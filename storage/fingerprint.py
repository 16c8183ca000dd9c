"""Fingerprints: has a stage's output been made from exactly this?"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

Basis = dict[str, Any]
"""What a fingerprint was made of, kept in manifests so that a difference can be named."""


def basis_of(
    stage: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Iterable[str],
    model_id: str = "",
) -> Basis:
    """Stage, its version, its own settings, its inputs' fingerprints, the model behind it."""
    return {
        "stage": stage,
        "version": version,
        "config": json.loads(canonical(config)),
        "inputs": list(inputs),
        "model_id": model_id,
    }


def fingerprint(
    stage: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Iterable[str],
    model_id: str = "",
) -> str:
    """32 hex digits that change when anything in `basis_of` the same arguments changes."""
    return fingerprint_of(basis_of(stage, version, config, inputs, model_id))


def fingerprint_of(basis: Mapping[str, Any]) -> str:
    """32 hex digits of a basis."""
    return hashlib.sha256(canonical(basis).encode()).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN, sets and objects are refused with TypeError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields that differ, dotted, as `field: old -> new`, sorted by field."""
    before, after = _flat(old), _flat(new)
    absent = "(absent)"
    return [
        f"{field}: {_short(before.get(field, absent))} -> {_short(after.get(field, absent))}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field, absent) != after.get(field, absent)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = {f"{prefix}.{k}" if prefix else str(k): v for k, v in value.items()}
    elif isinstance(value, list | tuple) and value:
        items = {f"{prefix}[{i}]": v for i, v in enumerate(value)}
    else:
        return {prefix: value} if prefix else {}
    return {name: leaf for key, item in items.items() for name, leaf in _flat(item, key).items()}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
