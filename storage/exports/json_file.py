"""Large JSON files: put together from lines that the pieces left, and read back line by line."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TextIO

from storage import ids
from storage.exports.format import DamagedExport
from storage.exports.pieces import json_line
from storage.exports.target import LEDGER, PieceRecord, Target

CHUNK_ENTRIES = 256


def lines(index: int, kind: str) -> str:
    """Where a piece leaves its lines of a kind until the end."""
    return f"{LEDGER}/piece-{index:05d}.{kind}"


def add(f: TextIO, records: Iterable[Any]) -> None:
    """Append records, a line each."""
    f.writelines(f"{json_line(record)}\n" for record in records)


def write_list(f: BinaryIO, target: Target, pieces: Sequence[PieceRecord], kind: str) -> None:
    """Write a JSON list of the lines of all pieces, an element a line."""
    between = b"[\n"
    for piece in pieces:
        with target.root.open(lines(piece.index, kind)) as source:
            for line in source:
                f.write(between + line.rstrip(b"\n"))
                between = b",\n"
    f.write(b"\n]" if between == b",\n" else b"[]")


def read_list(target: Target, rel: str) -> Iterator[tuple[int, Any]]:
    """(number of its list in the file, element) of every element that `write_list` wrote."""
    number = -1
    with target.root.open(rel) as f:
        for line in f:
            text = line.rstrip(b"\n")
            if text.endswith(b"["):
                number += 1
            elif text.startswith(b"{") and number >= 0:
                try:
                    yield number, json.loads(text.removesuffix(b","))
                except ValueError as err:
                    raise DamagedExport(target, rel, f"is not JSON ({err})") from err


def chunked(entries: Iterable[Any]) -> Iterator[list[Any]]:
    """Some entries at a time."""
    rest = iter(entries)
    while chunk := list(itertools.islice(rest, CHUNK_ENTRIES)):
        yield chunk


def check_images(target: Target, paths: Sequence[str]) -> None:
    """Raise DamagedExport unless every image is there with the bytes that its name says."""
    full = {target.root.path(path): path for path in paths}
    try:
        found = target.root.fs.cat(list(full), on_error="return") if full else {}
    except FileNotFoundError:
        found = {}
    for place, path in full.items():
        data = found.get(place)
        if not isinstance(data, bytes):
            raise DamagedExport(target, path, "is gone")
        if ids.image_id(data) != PurePosixPath(path).stem:
            raise DamagedExport(target, path, "has other bytes than its name says")
