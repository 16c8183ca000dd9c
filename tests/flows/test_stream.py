"""Pictures come in order across the borders of shards, read ahead but not without limit."""

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip_core import EvalTransform
from flows import stream as module
from flows.decoders import CHUNK_IMAGES, Decoders
from flows.errors import MissingInput
from flows.stream import ImageRow, ImageStream, Piece
from storage import Lake, image_id
from storage.shards import Sample, write_shard
from storage.spans import Wanted

SIZE = 8


@dataclass(frozen=True)
class Job:
    """Images of one shard."""

    name: str
    images: list[ImageRow]


def _png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake.open(str(tmp_path / "lake"), create=True)


def _shard(lake: Lake, name: str, images: list[bytes]) -> Job:
    samples = [
        Sample(key=f"{i:032x}", image=image, ext="png", meta={}) for i, image in enumerate(images)
    ]
    _, ranges = write_shard(lake, name, samples)
    rows = [
        ImageRow(image_id=image_id(image), shard=name, offset=where.offset, size=where.size)
        for image, where in zip(images, ranges, strict=True)
    ]
    return Job(name, rows)


def _colour(pixels: torch.Tensor) -> int:
    red, green, _ = pixels[0, 0].tolist()
    return int(red) + 256 * int(green)


def test_stream_gives_every_picture_once_in_order_whatever_the_shards_hold(lake: Lake) -> None:
    sizes = [5, 0, module.BLOCK_IMAGES + 3, 1, 2 * CHUNK_IMAGES, 0]
    jobs, number = [], 0
    for index, count in enumerate(sizes):
        jobs.append(_shard(lake, f"s{index}", [_png(number + i) for i in range(count)]))
        number += count
    with Decoders([EvalTransform(SIZE)], workers=3) as decoders:
        with ImageStream(lake, iter(jobs), decoders, ahead=40) as stream:
            pieces = list(stream)
    pictures = [(piece.job.name, picture) for piece in pieces for picture in piece.pictures]
    assert [_colour(picture.pixels[0]) for _, picture in pictures] == list(range(number))
    assert [(name, picture.place) for name, picture in pictures] == [
        (job.name, place) for job in jobs for place in range(len(job.images))
    ]
    assert [piece.job.name for piece in pieces if piece.is_last] == [job.name for job in jobs]


def test_stream_asks_for_few_large_images_at_a_time(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _shard(lake, "s", [_png(i) for i in range(40)])
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * job.images[0].size)
    asked: list[int] = []
    original = module.read_images

    def read(lake: Lake, shard: str, wanted: list[Wanted]) -> object:
        asked.append(len(wanted))
        return original(lake, shard, wanted)

    monkeypatch.setattr(module, "read_images", read)
    with Decoders([EvalTransform(SIZE)], workers=2) as decoders:
        with ImageStream(lake, iter([job]), decoders, ahead=8) as stream:
            pictures = [picture for piece in stream for picture in piece.pictures]
    assert [_colour(picture.pixels[0]) for picture in pictures] == list(range(40))
    assert [picture.place for picture in pictures] == list(range(40))
    assert max(asked) <= 7
    assert sum(asked) == 40


def test_stream_reads_the_next_shard_while_the_last_one_is_worked_on(lake: Lake) -> None:
    jobs = [_shard(lake, f"s{i}", [_png(i * 10 + k) for k in range(4)]) for i in range(40)]
    decoded: list[int] = []

    class Counted(EvalTransform):
        def pixels(self, image: Image.Image) -> np.ndarray:
            found = super().pixels(image)
            decoded.append(_colour(torch.from_numpy(found)))
            return found

    with Decoders([Counted(SIZE)], workers=1) as decoders:
        decoded.clear()  # the transform was tried on a grey picture
        with ImageStream(lake, iter(jobs), decoders, ahead=1) as stream:
            pieces = iter(stream)
            first = next(pieces)
            second = next(pieces)
            assert (first.job.name, second.job.name) == ("s0", "s1")
            until = time.monotonic() + 20
            while 23 not in decoded and time.monotonic() < until:
                time.sleep(0.01)  # the second piece is being worked on
    assert 23 in decoded, "the third shard waited until it was asked for"
    assert len(decoded) <= 2 * CHUNK_IMAGES + 8, "it read on without limit"


def test_stream_decodes_further_ahead_when_batches_grow(lake: Lake) -> None:
    job = _shard(lake, "s", [_png(i) for i in range(300)])
    decoded: list[int] = []

    class Counted(EvalTransform):
        def pixels(self, image: Image.Image) -> np.ndarray:
            decoded.append(0)
            return super().pixels(image)

    def settled(at_least: int) -> int:
        until = time.monotonic() + 20
        while len(decoded) < at_least and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        return len(decoded)

    with Decoders([Counted(SIZE)], workers=1) as decoders:
        decoded.clear()
        with ImageStream(lake, iter([job]), decoders, ahead=1) as stream:
            pieces = iter(stream)
            next(pieces)
            assert settled(32) <= 3 * CHUNK_IMAGES
            stream.look_ahead(200)
            next(pieces)
            assert 200 <= settled(200) <= 200 + 3 * CHUNK_IMAGES


def test_stream_raises_what_is_wrong_with_a_shard_after_the_shards_before_it(lake: Lake) -> None:
    good = _shard(lake, "good", [_png(i) for i in range(3)])
    planned = threading.Event()

    def plan() -> Iterator[Job]:
        yield good
        planned.set()
        raise MissingInput("the second shard has no captions")

    seen: list[Piece[Job]] = []

    def take_all() -> None:
        with (
            Decoders([EvalTransform(SIZE)], workers=1) as decoders,
            ImageStream(lake, plan(), decoders, ahead=100) as stream,
        ):
            for piece in stream:
                planned.wait(10)
                seen.append(piece)

    with pytest.raises(MissingInput, match="second shard"):
        take_all()
    assert [piece.job.name for piece in seen] == ["good"]
    assert seen[0].is_last


def test_stream_gives_images_that_a_shard_has_lost_their_error(lake: Lake) -> None:
    job = _shard(lake, "s", [_png(i) for i in range(20)])
    path = lake.root.local_path("shards/s.tar")
    assert path is not None
    path.write_bytes(path.read_bytes()[: job.images[12].offset + 5])
    with Decoders([EvalTransform(SIZE)], workers=2) as decoders:
        with ImageStream(lake, iter([job]), decoders, ahead=8) as stream:
            pictures = [picture for piece in stream for picture in piece.pictures]
    assert [picture.is_unreadable for picture in pictures] == [False] * 12 + [True] * 8
    assert [_colour(picture.pixels[0]) for picture in pictures[:12]] == list(range(12))
    assert all(picture.error is None for picture in pictures[:12])


def test_stream_keeps_pixels_of_the_models_type(lake: Lake) -> None:
    job = _shard(lake, "s", [_png(3)])
    with Decoders([EvalTransform(4), EvalTransform(6)], workers=1) as decoders:
        with ImageStream(lake, iter([job]), decoders, ahead=8) as stream:
            (picture,) = [picture for piece in stream for picture in piece.pictures]
    small, large = picture.pixels
    assert (small.shape, small.dtype) == ((4, 4, 3), torch.uint8)
    assert (large.shape, np.asarray(large).max()) == ((6, 6, 3), 7)
