"""The search for hashes that are nearly the same finds what comparing all with all would."""

from pathlib import Path

import numpy as np
import pytest

from storage.intake import near
from storage.intake.near import NearIndex


def _some(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, number, dtype=np.uint64)


def _flipped(hashes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The same with up to `most` bits turned."""
    drawn = np.random.default_rng(seed)
    changed = hashes.copy()
    for i in range(len(hashes)):
        for bit in drawn.choice(64, int(drawn.integers(0, most + 1)), replace=False):
            changed[i] ^= np.uint64(1) << np.uint64(bit)
    return changed


def _by_comparing_all(
    known: np.ndarray, places: np.ndarray, asked: np.ndarray, most: int
) -> list[tuple[int, int, int]]:
    found = set()
    for number, query in enumerate(asked.tolist()):
        for each, place in zip(known.tolist(), places.tolist(), strict=True):
            differ = each ^ query
            bands = [(differ >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
            if differ.bit_count() <= most and 0 in bands:
                found.add((number, differ.bit_count(), place))
    return sorted(found)


def _found(index: NearIndex, asked: np.ndarray) -> list[tuple[int, int, int]]:
    queries, places, bits = index.within(asked)
    return list(zip(queries.tolist(), bits.tolist(), places.tolist(), strict=True))


@pytest.mark.parametrize("most", [0, 3, 8])
@pytest.mark.parametrize("step", [1, 37])
def test_within_is_what_comparing_all_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, step: int
) -> None:
    monkeypatch.setattr(near, "TAIL", 64)
    monkeypatch.setattr(near, "_CHUNK", 500)
    known = _some(700, 1)
    known[100:140] = known[60:100]
    places = np.arange(700) // 2
    asked = np.concatenate([_flipped(known[::9], most + 3, 2), _some(20, 3)])
    with NearIndex(tmp_path, most) as index:
        for first in range(0, 700, step):
            index.add(known[first : first + step], places[first : first + step])
        assert len(index) == 700
        expected = _by_comparing_all(known, places, asked, most)
        assert len(expected) >= 20
        assert _found(index, asked) == expected
    assert not list(tmp_path.iterdir())


def test_up_to_three_bits_are_always_found(tmp_path: Path) -> None:
    known = _some(300, 5)
    with NearIndex(tmp_path, 3) as index:
        index.add(known, np.arange(300))
        found = _found(index, _flipped(known, 3, 6))
    assert {number for number, _, place in found if number == place} == set(range(300))


def test_an_empty_index_knows_nothing(tmp_path: Path) -> None:
    with NearIndex(tmp_path, 3) as index:
        assert _found(index, _some(3, 1)) == []
        assert _found(index, np.empty(0, np.uint64)) == []
