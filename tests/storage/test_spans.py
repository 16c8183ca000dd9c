"""Images of a shard are read together, and a damaged shard costs only what it has lost."""

import tarfile
from io import BytesIO

import pytest

from storage import ids, layout, spans
from storage.errors import CorruptShard
from storage.lake import Lake
from storage.shards import Sample, write_shard
from storage.spans import Wanted, read_images

NUM = 12


@pytest.fixture
def images() -> list[bytes]:
    return [bytes([i]) * (700 + 90 * i) for i in range(NUM)]


@pytest.fixture
def wanted(lake: Lake, images: list[bytes]) -> list[Wanted]:
    samples = [
        Sample(key=f"{i:032x}", image=image, ext="png", meta={"row": i})
        for i, image in enumerate(images)
    ]
    _, ranges = write_shard(lake, "s", samples)
    return [
        Wanted(image_id=ids.image_id(image), offset=where.offset, size=where.size)
        for image, where in zip(images, ranges, strict=True)
    ]


def _count_reads(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    original = type(lake.root).read_range

    def read(self: object, rel: str, offset: int, size: int) -> bytes:
        sizes.append(size)
        return original(lake.root, rel, offset, size)

    monkeypatch.setattr(type(lake.root), "read_range", read)
    return sizes


def test_read_images_reads_neighbours_at_once(
    lake: Lake, images: list[bytes], wanted: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _count_reads(lake, monkeypatch)
    assert read_images(lake, "s", wanted) == images
    assert len(sizes) == 1


def test_read_images_reads_few_of_many_by_range(
    lake: Lake, images: list[bytes], wanted: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "GAP_BYTES", 2000)
    sizes = _count_reads(lake, monkeypatch)
    places = [9, 0, 5]
    found = read_images(lake, "s", [wanted[place] for place in places])
    assert found == [images[place] for place in places]
    assert sorted(sizes) == [wanted[place].size for place in sorted(places)]


def test_read_images_keeps_one_read_below_its_limit(
    lake: Lake, images: list[bytes], wanted: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "SPAN_BYTES", 6000)
    sizes = _count_reads(lake, monkeypatch)
    assert read_images(lake, "s", wanted) == images
    assert len(sizes) > 1
    assert max(sizes) <= 6000


def test_read_images_of_a_shard_that_lost_a_member_misses_that_one_only(
    lake: Lake, images: list[bytes], wanted: list[Wanted]
) -> None:
    kept, whole = BytesIO(), BytesIO(lake.root.read_bytes(layout.shard("s")))
    with tarfile.open(fileobj=whole) as tar, tarfile.open(fileobj=kept, mode="w") as out:
        for member in tar:
            if member.name != f"{4:032x}.png":
                out.addfile(member, tar.extractfile(member))
    lake.root.write_bytes(layout.shard("s"), kept.getvalue())
    found = read_images(lake, "s", wanted)
    assert isinstance(found[4], CorruptShard)
    assert "restore it" in str(found[4])
    assert [*found[:4], *found[5:]] == [*images[:4], *images[5:]]


def test_read_images_of_a_shard_cut_in_the_middle_misses_what_lay_behind(
    lake: Lake, images: list[bytes], wanted: list[Wanted]
) -> None:
    whole = lake.root.read_bytes(layout.shard("s"))
    lake.root.write_bytes(layout.shard("s"), whole[: wanted[7].offset + 20])
    found = read_images(lake, "s", wanted)
    assert found[:7] == images[:7]
    assert all(isinstance(each, CorruptShard) for each in found[7:])


def test_read_images_says_that_a_shard_is_gone(lake: Lake, wanted: list[Wanted]) -> None:
    lake.root.remove(layout.shard("s"))
    with pytest.raises(CorruptShard, match=r"s\.tar is gone; restore it"):
        read_images(lake, "s", wanted)
