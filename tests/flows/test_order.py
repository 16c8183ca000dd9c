"""The order of rows: every place of an epoch once, drawn captions by weight, bounded memory."""

import errno
import mmap
import os
import random
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flows import order as order_module
from flows.errors import SettingsError
from flows.order import CaptionsPerEpoch, EpochOrder, draw_caption
from storage import TrainSet
from storage.errors import StorageFull
from storage.trainset import BATCH_ROWS, SCHEMA

SOURCES_OF_IMAGES = (
    ("web",),
    ("human", "human", "synthetic", "web"),
    ("synthetic", "web"),
    ("human", "human"),
    ("web", "web", "web"),
)


@pytest.fixture
def rows(tmp_path: Path) -> TrainSet:
    """Five images with one to four captions."""
    pairs = [
        (f"{image:032x}", f"text {n}", source)
        for image, sources in enumerate(SOURCES_OF_IMAGES)
        for n, source in enumerate(sources)
    ]
    image_ids, captions, sources = map(list, zip(*pairs, strict=True))
    return _written(tmp_path / "rows.arrow", image_ids, captions, sources)


def _written(path: Path, image_ids: list[str], captions: list[str], sources: list[str]) -> TrainSet:
    num_rows = len(image_ids)
    places = [["s"] * num_rows, range(num_rows), [9] * num_rows]
    table = pa.table([image_ids, captions, sources, *places], schema=SCHEMA)
    with pa.ipc.new_file(path, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return TrainSet(pa.ipc.open_file(pa.memory_map(str(path))), num_rows)


def _epoch(order: EpochOrder, epoch: int) -> list[int]:
    return [order.row(epoch * len(order) + place) for place in range(len(order))]


def test_all_captions_come_in_the_order_of_a_permutation_by_seed_and_epoch(rows: TrainSet) -> None:
    order = EpochOrder(rows, seed=3)
    assert len(order) == len(rows) == 12
    for epoch in range(4):
        expected = np.random.default_rng((3, 0, epoch)).permutation(12)
        assert _epoch(order, epoch) == expected.tolist(), "as in lakes that are there already"


def _is_mapped(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, mmap.mmap)


@pytest.mark.parametrize("captions_per_epoch", ["all", "one"])
def test_a_large_order_lies_in_a_file_and_is_the_same(
    captions_per_epoch: CaptionsPerEpoch,
    rows: TrainSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = EpochOrder(rows, seed=3, captions_per_epoch=captions_per_epoch)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(order_module, "MAPPED_FROM", 5)
    monkeypatch.setattr(order_module, "CHUNK", 2)
    mapped = EpochOrder(rows, seed=3, captions_per_epoch=captions_per_epoch, scratch=scratch)
    for epoch in range(3):
        assert _epoch(mapped, epoch) == _epoch(plain, epoch)
    held = [*mapped._epochs.values(), *([mapped._starts] if mapped._starts is not None else [])]
    assert len(held) == 3 + (captions_per_epoch == "one")
    assert all(_is_mapped(array) for array in held)
    assert not any(_is_mapped(array) for array in plain._epochs.values())
    assert list(scratch.iterdir()) == [], "nobody else sees the file, and a kill leaves nothing"


def test_an_order_that_finds_no_room_says_so(
    rows: TrainSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(order_module, "MAPPED_FROM", 5)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageFull, match=r"order of 12 rows .* machine.scratch"):
        EpochOrder(rows, seed=3, scratch=tmp_path).row(0)


def test_one_caption_of_every_image_comes_once_an_epoch(rows: TrainSet) -> None:
    order = EpochOrder(rows, seed=3, captions_per_epoch="one")
    assert len(order) == 5
    epochs = [_epoch(order, epoch) for epoch in range(60)]
    for drawn in epochs:
        assert sorted(rows.row(i).image_id for i in drawn) == rows.distinct("image_id")
    assert {i for drawn in epochs for i in drawn} == set(range(12)), "every caption has its turn"
    assert len({tuple(drawn) for drawn in epochs}) > 50
    other = EpochOrder(rows, seed=4, captions_per_epoch="one")
    assert [_epoch(other, epoch) for epoch in range(60)] != epochs


def test_sources_are_drawn_by_their_weights_and_share_them_evenly(rows: TrainSet) -> None:
    weights = {"web": 1.0, "synthetic": 1.0, "human": 2.0}
    order = EpochOrder(rows, seed=0, captions_per_epoch="one", source_weights=weights)
    drawn = Counter(i for epoch in range(2000) for i in _epoch(order, epoch))
    shares = [drawn[i] / 2000 for i in range(12)]
    two_equal, three_equal = [1 / 2, 1 / 2], [1 / 3, 1 / 3, 1 / 3]
    expected = [1, 1 / 4, 1 / 4, 1 / 4, 1 / 4, *two_equal, *two_equal, *three_equal]
    assert shares == pytest.approx(expected, abs=0.04)


def test_a_source_of_weight_zero_is_never_drawn(rows: TrainSet) -> None:
    weights = {"web": 1.0, "synthetic": 0.0, "human": 1.0}
    order = EpochOrder(rows, seed=0, captions_per_epoch="one", source_weights=weights)
    drawn = {rows.row(i).source for epoch in range(300) for i in _epoch(order, epoch)}
    assert drawn == {"web", "human"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_draw_never_fall_on_weight_zero(share: float) -> None:
    weights = {"web": 0.0, "synthetic": 0.1, "human": 0.3}
    sources = ["web", "synthetic", "human", "human", "human", "web"]
    assert draw_caption(sources, weights, share) in (1, 2, 3, 4)


def test_weights_that_do_not_fit_the_rows_are_refused(rows: TrainSet) -> None:
    with pytest.raises(SettingsError, match=r"no weight for human, synthetic, of which"):
        EpochOrder(rows, seed=0, captions_per_epoch="one", source_weights={"web": 1.0})
    weights = {"web": 0.0, "synthetic": 1.0, "human": 1.0}
    with pytest.raises(SettingsError, match=rf"2 of 5 images .* web only.*the first: {0:032x}"):
        EpochOrder(rows, seed=0, captions_per_epoch="one", source_weights=weights)


def test_the_order_does_not_depend_on_who_asks_when(rows: TrainSet) -> None:
    weights = {"web": 1.0, "synthetic": 3.0, "human": 2.0}
    expected = [
        EpochOrder(rows, seed=1, captions_per_epoch="one", source_weights=weights).row(position)
        for position in range(40)
    ]
    shared = EpochOrder(rows, seed=1, captions_per_epoch="one", source_weights=weights)
    positions = list(range(40))
    random.Random(0).shuffle(positions)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(positions, pool.map(shared.row, positions), strict=True))
    shared.forget_before(39)
    assert [found[i] for i in range(40)] == expected
    assert [shared.row(i) for i in range(40)] == expected, "what was forgotten is made again"


def test_the_draw_of_an_image_does_not_depend_on_the_other_images(
    rows: TrainSet, tmp_path: Path
) -> None:
    texts = [rows.row(i) for i in range(1, 5)]
    columns = [[getattr(row, name) for row in texts] for name in ("image_id", "caption", "source")]
    alone = EpochOrder(_written(tmp_path / "a.arrow", *columns), seed=5, captions_per_epoch="one")
    among = EpochOrder(rows, seed=5, captions_per_epoch="one")
    for epoch in range(30):
        assert {1 + row for row in _epoch(alone, epoch)} == set(_epoch(among, epoch)) & {1, 2, 3, 4}


@pytest.mark.parametrize(("captions_per_epoch", "most"), [("all", 4.5), ("one", 6.5)])
def test_an_order_costs_a_few_bytes_a_row(
    captions_per_epoch: CaptionsPerEpoch, most: float, tmp_path: Path
) -> None:
    num_rows = 200_000  # two captions an image
    ids = [f"{row // 2:032x}" for row in range(num_rows)]
    rows = _written(tmp_path / "many.arrow", ids, ids, ["web"] * num_rows)
    del ids
    tracemalloc.start()
    try:
        order = EpochOrder(rows, seed=0, captions_per_epoch=captions_per_epoch)
        for epoch in range(5):
            order.forget_before(epoch * len(order))
            order.row(epoch * len(order))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < most * num_rows
