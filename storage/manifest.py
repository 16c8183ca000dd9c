"""The manifest of a part: its commit record, written last, beside it."""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from storage.errors import CorruptPart
from storage.fs import Root
from storage.schemas import SCHEMA_VERSION

_AT_ONCE = 256
"""Manifests that are read together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a part holds and what it was made from."""

    stage: str
    table: str
    part: str
    round: int | None
    fingerprint: str
    basis: Mapping[str, Any] = field(default_factory=dict)
    """What the fingerprint was made of, so that a difference can be named."""
    num_in: int
    num_ok: int
    num_not_ok: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    """How many rows of the input are not ok, by status."""
    num_rows: int
    num_bytes: int
    sha256: str
    inputs: tuple[str, ...] = ()
    """Fingerprints of what it was made from."""
    versions: Mapping[str, str] = field(default_factory=dict)
    started_at: str = ""
    seconds: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the steps inside the stage: `write` in every part; of captions and scores also `read` and `decode`
    (summed over the threads that do it meanwhile), `wait` (the model for images), `encode`, `generate` or `score`."""

    coming: Mapping[str, Any] = field(default_factory=dict)
    """While the part is being replaced, the manifest that is to follow: its file may be there already."""
    purged: Mapping[str, Any] = field(default_factory=dict)
    """Of a part that a purge has touched: `rows` of it that went, and the fingerprints that it `was` known by."""

    def __post_init__(self) -> None:
        """Every row that came in went out as ok or not ok, with a status."""
        name = f"{self.stage}: part {self.table}/{self.part}"
        assert self.num_in == self.num_ok + self.num_not_ok, (
            f"{name}: {self.num_in} rows in, but {self.num_ok} ok + {self.num_not_ok} not ok"
        )
        assert sum(self.reasons.values()) == self.num_not_ok, (
            f"{name}: {self.num_not_ok} rows not ok, but reasons for {dict(self.reasons)}"
        )


def write_manifest(root: Root, rel: str, manifest: Manifest) -> None:
    """Commit: after this the part is seen by readers."""
    record = asdict(manifest)
    record = {k: v for k, v in record.items() if v or k not in ("coming", "purged")}
    root.write_bytes(rel, json.dumps(record, indent=2, sort_keys=True).encode())


def read_manifest(root: Root, rel: str) -> Manifest | None:
    """The manifest at `rel`, None when there is none; CorruptPart when it is not readable."""
    return next(read_manifests(root, [rel]))


def read_manifests(root: Root, rels: list[str]) -> Iterator[Manifest | None]:
    """The manifests at some paths, in their order; None and CorruptPart as `read_manifest`."""
    for first in range(0, len(rels), _AT_ONCE):
        some = rels[first : first + _AT_ONCE]
        for rel, data in zip(some, root.read_many(some), strict=True):
            yield None if data is None else _parsed(root, rel, data)


def _parsed(root: Root, rel: str, data: bytes) -> Manifest:
    try:
        record = json.loads(data)
        known = {f.name for f in fields(Manifest)}
        record = {k: v for k, v in record.items() if k in known}
        return Manifest(**record | {"inputs": tuple(record.get("inputs", ()))})
    except (ValueError, TypeError, AttributeError) as err:
        raise CorruptPart(
            f"manifest {root.uri}/{rel} is not readable ({err}); remove it, or run "
            "`bootstrap repair`, and run the stage again: its part is then made anew"
        ) from err


@cache
def versions() -> Mapping[str, str]:
    """What wrote a part: the schema and the libraries whose bytes are in it."""
    names = ("pyarrow", "duckdb", "pillow", "img2dataset")
    found = {"schema": str(SCHEMA_VERSION)}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
