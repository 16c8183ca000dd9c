import tarfile

import pytest

from storage import ids, layout
from storage.errors import CorruptShard
from storage.lake import Lake
from storage.shards import (
    Sample,
    iter_shard,
    read_image,
    read_verified_image,
    write_shard,
)

SAMPLES = [
    Sample(key=f"{i:032x}", image=bytes([i]) * (500 + i), ext="jpg", meta={"text": "caf\u00e9"})
    for i in range(5)
]


def test_shard_gives_each_image_by_its_byte_range(lake: Lake) -> None:
    ref, ranges = write_shard(lake, "web-0001-00000", SAMPLES)
    assert ref.num_samples == 5
    for sample, where in zip(SAMPLES, ranges, strict=True):
        assert where.key == sample.key
        image = ids.image_id(sample.image)
        got = read_verified_image(lake, ref.name, where.offset, where.size, image)
        assert got == sample.image


def test_shard_is_a_plain_webdataset_tar_that_iterates(lake: Lake) -> None:
    ref, _ = write_shard(lake, "s", SAMPLES)
    assert list(iter_shard(lake, "s")) == SAMPLES
    with lake.root.open(ref.path) as f, tarfile.open(fileobj=f) as tar:
        assert tar.getnames()[:2] == [f"{SAMPLES[0].key}.jpg", f"{SAMPLES[0].key}.json"]


def test_shard_has_the_same_bytes_when_written_again(lake: Lake) -> None:
    ref, _ = write_shard(lake, "s", SAMPLES)
    first = lake.root.read_bytes(ref.path)
    write_shard(lake, "s", SAMPLES)
    assert lake.root.read_bytes(ref.path) == first


def test_write_shard_refuses_a_key_twice_and_leaves_no_file(lake: Lake) -> None:
    with pytest.raises(AssertionError, match="twice"):
        write_shard(lake, "s", [SAMPLES[0], SAMPLES[0]])
    assert lake.root.list("shards") == []


def test_read_image_names_the_shard_when_it_is_gone_short_or_changed(lake: Lake) -> None:
    ref, ranges = write_shard(lake, "s", SAMPLES)
    last = ranges[-1]
    data = lake.root.read_bytes(ref.path)
    with pytest.raises(CorruptShard, match=r"s\.tar.*are not image"):
        read_verified_image(lake, "s", last.offset + 1, last.size - 1, ids.image_id(b""))
    lake.root.write_bytes(layout.shard("s"), data[: last.offset + 10])
    with pytest.raises(CorruptShard, match=r"s\.tar ends at byte"):
        read_image(lake, "s", last.offset, last.size)
    with pytest.raises(CorruptShard, match=r"s\.tar"):
        list(iter_shard(lake, "s"))
    lake.root.remove(layout.shard("s"))
    with pytest.raises(CorruptShard, match=r"s\.tar is gone"):
        read_image(lake, "s", last.offset, last.size)
