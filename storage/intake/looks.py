"""What a picture looks like, in some 140 bytes: two copies of it agree, also resized, recompressed, cropped or framed.

Five views of a picture (whole, without a plain frame, without its outer twentieth, without a bar at its foot or its head)
each give a difference hash and a DCT hash of their brightness, and mean colours of a 2 x 2 grid. A copy has some view in
common with its original. The first hash is what is searched by; the second and the colours tell apart what only
happens to have like edges.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

VIEWS = 5
SIDE = 64
"""Of the thumbnail that everything is computed from, in px."""
_CROP = 0.05
_PLAIN = 6.0
"""Largest standard deviation, of 255, of a line that is part of a frame."""
_MOST_FRAME = 16
"""Lines of a frame, of SIDE, at each edge."""
_BAR = (44, 62)
"""Where a bar at the foot may begin, in lines."""
_DCT_SIDE, _DCT_KEPT = 32, 9

EDGE_BITS = 8
FORM_BITS = 16
COLOUR_STEPS = 40
"""The most that two views of the same picture differ: bits of either hash, and mean steps of 255 of a colour."""


@dataclass(frozen=True, slots=True, eq=False)
class Looks:
    """The views of one picture."""

    edges: np.ndarray
    """(VIEWS,) uint64: is each of 8 x 8 fields brighter than its left neighbour?"""
    forms: np.ndarray
    """(VIEWS,) uint64: is each of 64 low frequencies above their median?"""
    colours: np.ndarray
    """(VIEWS, 12) uint8: red, green and blue of four fields."""

    @property
    def phash(self) -> str:
        """The difference hash of the whole picture, 16 hex digits."""
        return f"{int(self.edges[0]):016x}"

    def __reduce__(self) -> tuple[Callable[[bytes], "Looks"], tuple[bytes]]:
        """Sent to another process as a column holds them."""
        return looks_of_bytes, (self.to_bytes(),)

    def to_bytes(self) -> bytes:
        """As a column holds them."""
        edges, forms = self.edges.astype("<u8"), self.forms.astype("<u8")
        return edges.tobytes() + forms.tobytes() + self.colours.tobytes()


NUM_BYTES = VIEWS * (8 + 8 + 12)


def looks_of_bytes(data: bytes) -> Looks:
    """The inverse of `Looks.to_bytes`."""
    middle = 8 * VIEWS
    return Looks(
        np.frombuffer(data[:middle], "<u8"),
        np.frombuffer(data[middle : 2 * middle], "<u8"),
        np.frombuffer(data[2 * middle :], np.uint8).reshape(VIEWS, 12),
    )


def looks_of(image: Image.Image) -> Looks:
    """The looks of a decoded picture of any mode."""
    small = _rgb(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    grey = small.convert("L")
    boxes = _boxes(np.asarray(grey))
    fields = _views(grey, boxes, (9, 8))
    forms = _views(grey, boxes, (_DCT_SIDE, _DCT_SIDE))
    colours = _views(small, boxes, (2, 2)).reshape(VIEWS, 12)
    basis = _dct_basis()
    # The lowest frequency is the mean brightness.
    low = (basis @ forms.astype(np.float32) @ basis.T).reshape(VIEWS, -1)[:, 1:65]
    middle = np.partition(low, (31, 32), axis=1)[:, 31:33].mean(axis=1, keepdims=True)
    return Looks(
        _packed((fields[:, :, 1:] > fields[:, :, :-1]).reshape(VIEWS, 64)),
        _packed(low > middle),
        colours,
    )


def are_alike(a: Looks, view_of_a: int, b: Looks, view_of_b: int) -> bool:
    """Whether two views, whose edges agree, show the same picture."""
    form_bits = int(np.bitwise_count(a.forms[view_of_a] ^ b.forms[view_of_b]))
    steps = np.abs(a.colours[view_of_a].astype(int) - b.colours[view_of_b].astype(int)).mean()
    return form_bits <= FORM_BITS and float(steps) <= COLOUR_STEPS


def _views(
    image: Image.Image, boxes: list[tuple[float, float, float, float]], size: tuple[int, int]
) -> np.ndarray:
    """(VIEWS, height, width, ...) uint8: boxes of a picture, each at a size."""
    width, height = size
    # One above the other, for to leave Pillow once costs less than to leave it for each.
    column = Image.new(image.mode, (width, height * VIEWS))
    for number, box in enumerate(boxes):
        column.paste(image.resize(size, Image.Resampling.BOX, box=box), (0, number * height))
    pixels = np.asarray(column)
    return pixels.reshape(VIEWS, height, *pixels.shape[1:])


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow cuts 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _boxes(grey: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each view of a (SIDE, SIDE) uint8 thumbnail, in px."""
    cut = _CROP * SIDE
    values = grey.astype(np.int32)
    steps = np.partition(np.abs(np.diff(values, axis=0)), (SIDE // 2 - 1, SIDE // 2), axis=1)
    # Twice the median, which compares as it does.
    steps = steps[:, SIDE // 2 - 1] + steps[:, SIDE // 2]
    first, last = _BAR
    foot = first + int(np.argmax(steps[first - 1 : last - 1]))
    head = SIDE - last + 1 + int(np.argmax(steps[SIDE - last : SIDE - first]))
    squares = values * values
    is_plain = _are_plain(values.sum(axis=1), squares.sum(axis=1), SIDE)
    # Sums of the lines above each, from which those of any run of lines follow.
    sums, sums_of_squares = np.zeros((2, SIDE + 1, SIDE), np.int32)
    np.cumsum(values, axis=0, out=sums[1:])
    np.cumsum(squares, axis=0, out=sums_of_squares[1:])

    def without_frame(top: int, bottom: int) -> tuple[int, int, int, int]:
        columns = _are_plain(
            sums[bottom] - sums[top], sums_of_squares[bottom] - sums_of_squares[top], bottom - top
        )
        rows = is_plain[top:bottom]
        above, below = _frame(rows), _frame(rows[::-1])
        return _frame(columns), top + above, SIDE - _frame(columns[::-1]), bottom - below

    return [
        (0, 0, SIDE, SIDE),
        without_frame(0, SIDE),
        (cut, cut, SIDE - cut, SIDE - cut),
        without_frame(0, foot),
        without_frame(head, SIDE),
    ]


def _are_plain(sums: np.ndarray, sums_of_squares: np.ndarray, num: int) -> np.ndarray:
    """Which lines of `num` pixels deviate by less than _PLAIN from their mean."""
    return num * sums_of_squares - sums * sums < (_PLAIN * num) ** 2


def _frame(is_plain: np.ndarray) -> int:
    """How many of the first lines are plain; 0 when so many are that there is no saying where a frame ends."""
    return max(is_plain[: _MOST_FRAME + 1].tobytes().find(b"\0"), 0)


@functools.cache
def _dct_basis() -> np.ndarray:
    """(9, 32): the lowest frequencies of the orthonormal DCT-II."""
    k, n = np.arange(_DCT_KEPT)[:, None], np.arange(_DCT_SIDE)[None]
    basis = np.cos(np.pi * (2 * n + 1) * k / (2 * _DCT_SIDE)) * np.sqrt(2 / _DCT_SIDE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _packed(bits: np.ndarray) -> np.ndarray:
    """(VIEWS, 64) bool to (VIEWS,) uint64, the first bit highest."""
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
