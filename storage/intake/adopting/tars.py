"""Samples of a webdataset tar, img2dataset's included: one pass from end to end, nothing extracted.

Names in a tar are only names here: an absolute path, or one with `..`, leads nowhere.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ConfigError
from storage.intake.adopting.found import IMAGE_ENDINGS, TEXT_ENDINGS, Fields, Found, distinct
from storage.intake.outcomes import outcome_of_img2dataset

_MOST_SIDECAR_BYTES = 4 << 20
NO_REASON = "img2dataset gave no reason"


@dataclass(slots=True)
class _Sample:
    """Members of a tar that follow one another and have a key in common."""

    key: str
    images: list[tuple[str, tarfile.TarInfo, bytes | None]] = field(default_factory=list)
    """Ending, member, and bytes unless there are too many."""
    texts: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)


def read_tar(
    f: BinaryIO, name: str, fields: Fields, max_bytes: int, table: Mapping[str, dict[str, Any]]
) -> Iterator[Found]:
    """Each sample of an opened tar, then the rows of its `table` (by key) that have no sample.

    A tar that breaks off gives what comes before, and a row that says so.
    """
    seen: set[str] = set()
    broken: str | None = None
    samples = _samples(f, fields, max_bytes)
    while True:
        try:
            sample = next(samples, None)
        except (tarfile.TarError, EOFError, UnicodeError) as err:
            broken = f"the tar breaks off after {len(seen)} samples: {err}"
            break
        if sample is None:
            break
        key = _unused(sample.key, seen)
        seen.add(key)
        yield from _rows_of(sample, f"{name}/{key}", fields, max_bytes, table.get(sample.key))
    for key, row in table.items():
        if key not in seen:
            yield _row_without_image(row, f"{name}/{key}", fields, broken)
    if broken is not None and not table:
        yield Found(name=f"{name}/", status="lost", reason=broken)


def read_statistics(f: BinaryIO, name: str) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's Parquet file beside a tar, by key; ConfigError when it cannot be read."""
    try:
        table = pq.read_table(f)
        if not {"key", "status"} <= set(table.column_names):
            raise ConfigError(
                f"{name} has no columns key and status, so it is not img2dataset's: set format to webdataset to take the "
                "tars alone"
            )
        return {str(row["key"]): row for row in table.to_pylist()}
    except (pa.ArrowException, OSError) as err:
        raise ConfigError(
            f"{name} is not a readable Parquet file ({err}); remove it, and its tar is taken by what is in it"
        ) from err


def _samples(f: BinaryIO, fields: Fields, max_bytes: int) -> Iterator[_Sample]:
    with tarfile.open(fileobj=f, mode="r:") as tar:
        sample: _Sample | None = None
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header
            if not member.isreg():
                continue
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if sample is None or sample.key != key or ending in sample.endings:
                # A key twice side by side is two samples.
                if sample is not None:
                    yield sample
                sample = _Sample(key=key)
            sample.endings.add(ending)
            _add(tar, member, ending, sample, fields, max_bytes)
        if sample is not None:
            yield sample
        f.seek(tar.offset)
        if f.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("it ends within a header")


def _add(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    ending: str,
    sample: _Sample,
    fields: Fields,
    max_bytes: int,
) -> None:
    kind = ending.rpartition(".")[2].lower()
    if kind in IMAGE_ENDINGS:
        fits = member.size <= max_bytes and not member.issparse()
        sample.images.append((ending, member, _bytes(tar, member) if fits else None))
        return
    is_text = ending == fields.caption if fields.caption else kind in TEXT_ENDINGS
    if not (is_text or kind == "json") or member.size > _MOST_SIDECAR_BYTES:
        return
    data = _bytes(tar, member)
    if is_text:
        sample.texts.append(data.decode("utf-8", "replace"))
        return
    try:
        record = json.loads(data)
        sample.record |= record if isinstance(record, dict) else {"json": record}
    except ValueError as err:
        sample.record["json"] = f"not readable: {err}"


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    data = opened.read() if opened is not None else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} breaks off")
    return data


def _rows_of(
    sample: _Sample, name: str, fields: Fields, max_bytes: int, row: Mapping[str, Any] | None
) -> Iterator[Found]:
    told = fields.told({**sample.record, **(row or {})})
    told["texts"] = distinct([*sample.texts, *told["texts"]])
    if not sample.images:
        yield Found(name=name, status="not_an_image", reason="the sample has no picture", **told)
    for ending, member, image in sample.images:
        own = name if len(sample.images) == 1 else f"{name}.{ending}"
        if image is not None:
            yield Found(name=own, image=image, offset=member.offset_data, **told)
            continue
        status, reason = "too_large", f"{member.size} bytes, more than {max_bytes}"
        if member.issparse():
            status, reason = "lost", "stored sparse in its tar, so that it has no place of its own"
        yield Found(name=own, status=status, reason=reason, **told)


def _row_without_image(
    row: Mapping[str, Any], name: str, fields: Fields, broken: str | None
) -> Found:
    """A row of img2dataset's that has no sample: it failed, or its bytes are gone."""
    if row["status"] == "success":
        status, reason = "lost", broken or "its bytes are not in the tar"
    else:
        status, reason = outcome_of_img2dataset(row.get("error_message") or NO_REASON)
    return Found(name=name, status=status, reason=reason, **fields.told(row))


def _unused(key: str, seen: set[str]) -> str:
    """The key, or with a number behind it when the tar has it before."""
    if key not in seen:
        return key
    return next(other for n in count(2) if (other := f"{key}#{n}") not in seen)


def is_tar(path: str) -> bool:
    """Whether a file is a tar that can be pointed into."""
    return PurePosixPath(path).suffix.lower() == ".tar"
