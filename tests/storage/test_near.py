"""The search for hashes that are nearly the same finds what comparing all with all would."""

import subprocess
import sys
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
    monkeypatch.setattr(near, "_WINDOW", 500)
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


def _with_crowds(number: int) -> np.ndarray:
    """Hashes of which 40 % have the same bits in a band and 10 % are one hash: frames and plain pictures do that."""
    known = _some(number, 11)
    crowd = slice(number // 10, number // 2)
    known[crowd] = (known[crowd] & ~np.uint64(0xFFFF << 32)) | np.uint64(7 << 32)
    known[number // 2 : number * 6 // 10] = known[number // 2]
    return np.random.default_rng(12).permutation(known)


@pytest.mark.parametrize("window", [7, 100, 100_000])
@pytest.mark.parametrize("number", [37, 73, 299, 520, 901])
def test_merging_changes_nothing_of_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, number: int
) -> None:
    monkeypatch.setattr(near, "TAIL", 37)
    monkeypatch.setattr(near, "_WINDOW", window)
    known, places = _with_crowds(number), _some(number, 13) >> np.uint64(2)
    asked = np.concatenate([_flipped(known[::20], 4, 14), known[:3], _some(5, 15)])
    sizes = np.random.default_rng(16)
    with NearIndex(tmp_path, 30) as index:
        until = 0
        while until < number:
            first, until = until, until + int(sizes.integers(0, 120))
            index.add(known[first:until], places[first:until])
            if sizes.random() < 0.2 or until >= number:
                expected = _by_comparing_all(known[:until], places[:until], asked, 30)
                assert _found(index, asked) == expected
        assert len(index) == number
        assert len(expected) > number // 10


_BUILDS = """
import sys
from pathlib import Path
import numpy as np
from storage.intake import near

drawn = np.random.default_rng(0)

def most_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

with near.NearIndex(Path(sys.argv[1]), 8) as index:
    for number in map(int, sys.argv[2:]):
        while len(index) < number:
            index.add(drawn.integers(0, 2**64, 10_000, dtype=np.uint64), np.arange(10_000, dtype=np.uint64))
            index.within(drawn.integers(0, 2**64, 5, dtype=np.uint64))
        print(most_mib())
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the memory")
def test_memory_does_not_grow_with_what_is_merged(tmp_path: Path) -> None:
    """Ten times the hashes, whose segments have 80 MiB more: the process has less than a third of that more."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILDS, str(tmp_path), "150000", "1500000"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    few, many = map(float, done.stdout.split())
    assert many - few < 24


def test_an_index_that_cannot_be_written_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "TAIL", 64)
    known = _some(128, 17)
    with NearIndex(tmp_path, 3) as index:
        index.add(known, np.arange(128))
        full = tmp_path / "full"
        index._folder = full
        with pytest.raises(OSError, match="full"):
            index.add(known[:1], np.arange(128, 129))
        assert _found(index, known) == [(number, 0, number) for number in range(128)]
        full.mkdir()
        index.add(known[:1], np.arange(128, 129))
        assert _found(index, known[:1]) == [(0, 0, 0), (0, 0, 128)]


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
