"""A search over 64-bit hashes within a few bits, on disk, so that memory stays flat.

Two hashes are compared when they agree in one of four bands of 16 bits: always so when they differ in at most three
bits, mostly so when in a few more. Hashes are kept in sorted segments that are merged as they grow, and the newest in a
tail that is compared one by one; what is found does not depend on where a hash is.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

BANDS, BAND_BITS = 4, 16
TAIL = 16_384
"""Hashes that are compared one by one before they become a segment."""
_CHUNK = 4_000_000
"""Comparisons at a time."""

_Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Numbers of queries, hashes to compare them with, and their places."""


class NearIndex:
    """Hashes with the places that they were added with; use it in a `with`."""

    def __init__(self, folder: Path, max_bits: int) -> None:
        """Files go below `folder` and away at the end; `max_bits` is the largest distance that counts."""
        self._dir = tempfile.TemporaryDirectory(dir=folder, prefix="_tmp-near-")
        self._max_bits = max_bits
        self._segments: list[_Segment] = []
        self._tail = np.empty(2 * TAIL, np.uint64)
        self._tail_places = np.empty(2 * TAIL, np.uint64)
        self._held = self._made = 0

    def __enter__(self) -> "NearIndex":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._segments.clear()
        self._dir.cleanup()

    def __len__(self) -> int:
        return self._held + sum(len(segment.hashes) for segment in self._segments)

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        """Remember (N,) uint64 hashes under (N,) uint64 places, up to TAIL at a time; several may share a place."""
        until = self._held + len(hashes)
        self._tail[self._held : until] = hashes
        self._tail_places[self._held : until] = places
        self._held = until
        if self._held >= TAIL:
            self._make_segment()

    def within(self, hashes: np.ndarray) -> _Found:
        """All matches of (N,) uint64 hashes: numbers of queries, places, bits that differ; each (M,).

        In the order of query, bits and place, none twice.
        """
        queries, places, distances = [], [], []
        for asked, found, at in self._candidates(hashes):
            bits = np.bitwise_count(hashes[asked] ^ found)
            near = bits <= self._max_bits
            queries.append(asked[near])
            places.append(at[near])
            distances.append(bits[near])
        if not queries:
            none = np.empty(0, np.int64)
            return none, none, none
        rows = np.stack(
            [np.concatenate(each).astype(np.int64) for each in (queries, distances, places)], axis=1
        )
        rows = np.unique(rows, axis=0)
        return rows[:, 0], rows[:, 2], rows[:, 1]

    def _candidates(self, hashes: np.ndarray) -> Iterator[_Found]:
        """What shares a band with a query; some pairs more than once."""
        tail, places = self._tail[: self._held], self._tail_places[: self._held]
        step = max(1, _CHUNK // max(1, self._held))
        for first in range(0, len(hashes) if self._held else 0, step):
            differ = hashes[first : first + step, None] ^ tail
            asked, at = np.nonzero(_shares_band(differ))
            yield asked + first, tail[at], places[at]
        for segment in self._segments:
            for band in range(BANDS):
                yield from segment.sharing(band, hashes)

    def _make_segment(self) -> None:
        """The tail becomes a segment, together with all segments that are no longer than what it is made of."""
        hashes = [self._tail[: self._held].copy()]
        places = [self._tail_places[: self._held].copy()]
        size = self._held
        while self._segments and len(self._segments[-1].hashes) <= size:
            last = self._segments.pop()
            hashes.append(np.asarray(last.hashes))
            places.append(np.asarray(last.places))
            size += len(last.hashes)
            last.remove()
        self._made += 1
        folder = Path(self._dir.name) / f"{self._made:06d}"
        self._segments.append(_Segment(folder, np.concatenate(hashes), np.concatenate(places)))
        self._held = 0


class _Segment:
    """Hashes on disk, with an order for each band."""

    def __init__(self, folder: Path, hashes: np.ndarray, places: np.ndarray) -> None:
        folder.mkdir()
        self._folder = folder
        self.hashes = _stored(folder / "hashes.npy", hashes)
        self.places = _stored(folder / "places.npy", places)
        self._orders, self._starts = [], []
        for band in range(BANDS):
            keys = _keys(hashes, band)
            # By radix, since the keys have 16 bits.
            order = np.argsort(keys, kind="stable").astype(np.uint32)
            self._orders.append(_stored(folder / f"order-{band}.npy", order))
            counts = np.bincount(keys, minlength=1 << BAND_BITS)
            self._starts.append(np.concatenate([[0], np.cumsum(counts)]))

    def sharing(self, band: int, hashes: np.ndarray) -> Iterator[_Found]:
        """What has the same bits in a band."""
        keys = _keys(hashes, band).astype(np.int64)
        begins = self._starts[band][keys]
        sizes = self._starts[band][keys + 1] - begins
        ends = np.cumsum(sizes)
        first = 0
        while first < len(hashes):
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
            mine = sizes[first:last]
            asked = np.repeat(np.arange(first, first + len(mine)), mine)
            within = np.arange(int(mine.sum())) - np.repeat(np.cumsum(mine) - mine, mine)
            at = self._orders[band][np.repeat(begins[first:last], mine) + within]
            yield asked, self.hashes[at], self.places[at]
            first = last

    def remove(self) -> None:
        """Take the files away."""
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()


def _keys(hashes: np.ndarray, band: int) -> np.ndarray:
    return ((hashes >> np.uint64(BAND_BITS * band)) & np.uint64(0xFFFF)).astype(np.uint16)


def _shares_band(differ: np.ndarray) -> np.ndarray:
    shares = np.zeros(differ.shape, bool)
    for band in range(BANDS):
        shares |= _keys(differ, band) == 0
    return shares


def _stored(path: Path, values: np.ndarray) -> np.ndarray:
    np.save(path, values)
    stored: np.ndarray = np.load(path, mmap_mode="r")
    return stored
