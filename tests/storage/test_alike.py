"""Copies of a picture are known again however they were changed, and other pictures are not taken for it."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageOps
from web_world import drawn

from storage.intake.alike import KnownLooks
from storage.intake.looks import NUM_BYTES, Looks, looks_of, looks_of_bytes

SHARED = Path(__file__).resolve().parents[3] / "shared" / "photos" / "images"


def _jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        return Image.open(data)

    return change


def _cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        box = (width * share, height * share, width * (1 - share), height * (1 - share))
        return image.crop(tuple(int(each) for each in box))  # type: ignore[arg-type]

    return change


def _with_bar(image: Image.Image) -> Image.Image:
    width, height = image.size
    framed = Image.new("RGB", (width, height + height // 6), "black")
    framed.paste(image, (0, 0))
    ImageDraw.Draw(framed).text((8, height + 8), "a caption below", fill="white")
    return framed


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a quarter of it": lambda image: image.resize((image.width // 4, image.height // 4)),
    "another shape": lambda image: image.resize((image.width, image.height * 2 // 3)),
    "jpeg 40": _jpeg(40),
    "jpeg 15": _jpeg(15),
    "2 % cropped": _cropped(0.02),
    "5 % cropped": _cropped(0.05),
    "white frame": lambda image: ImageOps.expand(image, 12, "white"),
    "black frame": lambda image: ImageOps.expand(image, 12, "black"),
    "bar below": _with_bar,
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_known_again_and_nothing_else_is(tmp_path: Path, change: str) -> None:
    pictures = [drawn(seed) for seed in range(40)]
    with KnownLooks(tmp_path) as known:
        for number, picture in enumerate(pictures):
            known.add(f"{number:032x}", looks_of(picture))
        found = [known.find(looks_of(CHANGES[change](picture))) for picture in pictures]
        others = [known.find(looks_of(drawn(seed))) for seed in range(100, 160)]
    right = sum(each == f"{number:032x}" for number, each in enumerate(found))
    assert right >= 36
    assert all(each is None or each == f"{number:032x}" for number, each in enumerate(found))
    assert others == [None] * 60


def test_the_first_of_several_alike_is_named(tmp_path: Path) -> None:
    with KnownLooks(tmp_path) as known:
        for number in (3, 1, 2):
            known.add(f"{number:032x}", looks_of(drawn(7)))
        assert known.find(looks_of(drawn(7))) == f"{3:032x}"
        assert len(known) == 3


def test_looks_survive_being_stored() -> None:
    looks = looks_of(drawn(1))
    data = looks.to_bytes()
    assert len(data) == NUM_BYTES
    again: Looks = looks_of_bytes(data)
    assert again.to_bytes() == data
    assert (again.colours == looks.colours).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_any_mode_has_looks(mode: str) -> None:
    image = drawn(2).convert("L").convert("I").convert("I;16") if mode == "I;16" else drawn(2)
    assert len(looks_of(image.convert(mode) if mode != "I;16" else image).to_bytes()) == NUM_BYTES


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2)])
def test_a_picture_of_any_size_has_looks(size: tuple[int, int]) -> None:
    assert len(looks_of(Image.new("RGB", size, "red")).to_bytes()) == NUM_BYTES


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real photographs beside the project")
def test_of_real_photographs_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    paths = sorted(SHARED.glob("*.jpg"))[:300]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    with KnownLooks(tmp_path) as known:
        for number, picture in enumerate(pictures):
            looks = looks_of(picture)
            assert known.find(looks) is None, paths[number]
            known.add(f"{number:032x}", looks)
        for name, change in CHANGES.items():
            found = [known.find(looks_of(change(picture))) for picture in pictures[:100]]
            right = sum(each == f"{number:032x}" for number, each in enumerate(found))
            wrong = sum(each not in (None, f"{n:032x}") for n, each in enumerate(found))
            assert (right >= 88, wrong) == (True, 0), (name, right)
