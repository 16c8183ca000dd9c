"""A search over 64-bit hashes within a few bits, on disk, so that memory stays flat.

Two hashes are compared when they agree in one of four bands of 16 bits: always so when they differ in at most three
bits, mostly so when in a few more. Hashes are kept in segments that are merged as they grow, and the newest in a tail
that is compared one by one; what is found does not depend on where a hash is.

A segment is one file in which each hash stands four times, once a band, in the order of band and bits, with its place
beside it: what a query is compared with are four short runs, each read by one call. Reading, not mapping, so that what
was read is no memory of this process; and merging goes through both files once, some keys at a time, in a fixed buffer.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

BANDS, BAND_BITS = 4, 16
TAIL = 8192
"""Hashes that are compared one by one before they become a segment."""
_WINDOW = 1 << 15
"""Entries of segments in memory at a time, 16 bytes each."""
_KEYS = BANDS << BAND_BITS
"""A key is a band and its bits."""
_SHIFTS = np.arange(0, BANDS * BAND_BITS, BAND_BITS, dtype=np.uint64)[:, None]
_FIRST_KEYS = np.arange(0, _KEYS, 1 << BAND_BITS)[:, None]
_ENTRY = np.dtype([("hash", np.uint64), ("place", np.uint64)])
_ENTRY_BYTES = _ENTRY.itemsize

_Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Numbers of queries, hashes to compare them with, and their places."""


class NearIndex:
    """Hashes with the places that they were added with; use it in a `with`."""

    def __init__(self, folder: Path, max_bits: int) -> None:
        """Files are made in `folder`, without names, and end with this; `max_bits` is the largest distance that counts."""
        self._folder = folder
        self._max_bits = max_bits
        self._segments: list[_Segment] = []
        self._tail = np.empty(TAIL, np.uint64)
        self._tail_places = np.empty(TAIL, np.uint64)
        self._held = 0

    def __enter__(self) -> "NearIndex":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for segment in self._segments:
            segment.close()
        self._segments.clear()

    def __len__(self) -> int:
        return self._held + sum(len(segment) for segment in self._segments)

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        """Remember (N,) uint64 hashes under (N,) uint64 places; several may share a place."""
        first = 0
        while first < len(hashes):
            if self._held == len(self._tail):
                self._make_segment()
            number = min(len(self._tail) - self._held, len(hashes) - first)
            until = self._held + number
            self._tail[self._held : until] = hashes[first : first + number]
            self._tail_places[self._held : until] = places[first : first + number]
            self._held = until
            first += number

    def within(self, hashes: np.ndarray) -> _Found:
        """All matches of (N,) uint64 hashes: numbers of queries, places, bits that differ; each (M,) int64.

        In the order of query, bits and place, none twice.
        """
        found = []
        for asked, others, places in self._candidates(hashes):
            bits = np.bitwise_count(hashes[asked] ^ others)
            near = np.flatnonzero(bits <= self._max_bits)
            if len(near):
                each = asked[near], bits[near], places[near]
                found.append(np.stack([one.astype(np.int64) for one in each]))
        if not found:
            none = np.empty(0, np.int64)
            return none, none, none
        matches = np.concatenate(found, axis=1)
        matches = matches[:, np.lexsort(matches[::-1])]
        is_new = np.ones(matches.shape[1], bool)
        is_new[1:] = (matches[:, 1:] != matches[:, :-1]).any(axis=0)
        asked, bits, places = matches[:, is_new]
        return asked, places, bits

    def _candidates(self, hashes: np.ndarray) -> Iterator[_Found]:
        """What shares a band with a query, or most of it; some pairs more than once."""
        yield from self._near_in_tail(hashes)
        asked, begins, sizes, segments = self._runs(hashes)
        ends = np.cumsum(sizes)
        first = 0
        while first < len(asked):
            done = ends[first] - sizes[first]
            last = int(np.searchsorted(ends, done + _WINDOW, side="right"))
            mine = slice(first, last)
            read = zip(segments[mine], begins[mine].tolist(), sizes[mine].tolist(), strict=True)
            runs = b"".join([segment.read(begin, size) for segment, begin, size in read])
            entries = np.frombuffer(runs, _ENTRY)
            yield np.repeat(asked[mine], sizes[mine]), entries["hash"], entries["place"]
            first = last

    def _runs(
        self, hashes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, "list[_Segment]"]:
        """Where each query finds its bands: query, first entry, entries (at most _WINDOW) and the segment."""
        keys = _keys(hashes).ravel()
        begins = np.array([segment.starts[keys] for segment in self._segments], np.int64).ravel()
        ends = np.array([segment.starts[keys + 1] for segment in self._segments], np.int64).ravel()
        some = np.flatnonzero(ends > begins)
        begins, ends = begins[some], ends[some]
        if len(some) and (ends - begins).max() > _WINDOW:
            pieces = -((begins - ends) // _WINDOW)
            some = np.repeat(some, pieces)
            firsts = np.repeat(np.cumsum(pieces) - pieces, pieces)
            begins = np.repeat(begins, pieces) + _WINDOW * (np.arange(len(some)) - firsts)
            ends = np.minimum(begins + _WINDOW, np.repeat(ends, pieces))
        segments = [self._segments[number] for number in (some // max(1, len(keys))).tolist()]
        return some % max(1, len(hashes)), begins, ends - begins, segments

    def _near_in_tail(self, hashes: np.ndarray) -> Iterator[_Found]:
        """Few bits are counted sooner than bands are compared, so what is near is found first."""
        tail, places = self._tail[: self._held], self._tail_places[: self._held]
        step = max(1, _WINDOW // max(1, self._held))
        for first in range(0, len(hashes) if self._held else 0, step):
            differ = hashes[first : first + step, None] ^ tail
            near = np.flatnonzero(np.bitwise_count(differ) <= self._max_bits)
            near = near[(_bands(differ.ravel()[near]) == 0).any(axis=0)]
            asked, at = np.divmod(near, self._held)
            yield asked + first, tail[at], places[at]

    def _make_segment(self) -> None:
        """The tail becomes a segment, together with all segments that are no longer than what it is made of."""
        parts = [_segment_of(self._tail, self._tail_places, self._folder)]
        size = len(parts[0])
        kept = len(self._segments)
        while kept and len(self._segments[kept - 1]) <= size:
            kept -= 1
            parts.insert(0, self._segments[kept])
            size += len(parts[0])
        if len(parts) > 1:
            merged = _merged(parts, self._folder)
            for part in parts:
                part.close()
            parts = [merged]
        self._segments[kept:] = parts
        self._held = 0


class _Segment:
    """Entries on disk in the order of their keys."""

    def __init__(self, file: IO[bytes], starts: np.ndarray) -> None:
        """`starts` (_KEYS + 1,) int64: where the entries of each key begin in the file, in entries."""
        self._file, self._fd = file, file.fileno()
        self.starts = starts

    def __len__(self) -> int:
        return int(self.starts[-1]) // BANDS

    def read(self, begin: int, size: int) -> bytes:
        """So many entries."""
        return os.pread(self._fd, size * _ENTRY_BYTES, begin * _ENTRY_BYTES)

    def close(self) -> None:
        """Give the file up; it has no name."""
        self._file.close()


def _segment_of(hashes: np.ndarray, places: np.ndarray, folder: Path) -> _Segment:
    entries = np.empty(len(hashes), _ENTRY)
    entries["hash"], entries["place"] = hashes, places
    # By radix, since the bits of a band are 16.
    order = np.argsort(_bands(hashes), axis=1, kind="stable")
    counts = np.bincount(_keys(hashes).ravel(), minlength=_KEYS)
    return _written([entries[order]], np.concatenate([[0], np.cumsum(counts)]), folder)


def _merged(parts: Sequence[_Segment], folder: Path) -> _Segment:
    starts = parts[0].starts.copy()
    for part in parts[1:]:
        starts += part.starts
    return _written(_windows(parts, starts), starts, folder)


def _windows(parts: Sequence[_Segment], starts: np.ndarray) -> Iterator[np.ndarray]:
    """The entries of the merged segment, which has the entries of a key one part after the other."""
    first = 0
    while first < _KEYS:
        last = int(np.searchsorted(starts, starts[first] + _WINDOW, side="right")) - 1
        if last > first:
            yield _window(parts, starts[first : last + 1], first)
        else:  # a key with more entries than a window
            last = first + 1
            for part in parts:
                begin, end = part.starts[first : last + 1].tolist()
                for at in range(begin, end, _WINDOW):
                    yield np.frombuffer(part.read(at, min(_WINDOW, end - at)), _ENTRY)
        first = last


def _window(parts: Sequence[_Segment], starts: np.ndarray, first: int) -> np.ndarray:
    """The entries of the keys from `first` on, of which `starts` says where they begin in the merged segment."""
    merged = np.empty(starts[-1] - starts[0], _ENTRY)
    nexts = starts[:-1] - starts[0]
    for part in parts:
        begins = part.starts[first : first + len(starts)]
        sizes = begins[1:] - begins[:-1]
        entries = np.frombuffer(part.read(int(begins[0]), int(begins[-1] - begins[0])), _ENTRY)
        at = np.repeat(nexts - (begins[:-1] - begins[0]), sizes)
        at += np.arange(len(entries))
        merged[at] = entries
        nexts += sizes
    return merged


def _written(pieces: Iterable[np.ndarray], starts: np.ndarray, folder: Path) -> _Segment:
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    try:
        for entries in pieces:
            file.write(entries.data)
        file.flush()
    except BaseException:
        file.close()
        raise
    return _Segment(file, starts)


def _bands(hashes: np.ndarray) -> np.ndarray:
    """(BANDS, N) uint16 of (N,) uint64."""
    return (hashes >> _SHIFTS).astype(np.uint16)


def _keys(hashes: np.ndarray) -> np.ndarray:
    """(BANDS, N) int64 of (N,) uint64."""
    return _bands(hashes) + _FIRST_KEYS
