import io

import numpy as np
import pytest
from PIL import Image
from web_world import jpeg

from storage.intake.images import difference_hash, inspect_image
from storage.intake.outcomes import STATUSES, status_of
from storage.intake.seen import SeenImages


def test_inspect_image_measures_a_good_one() -> None:
    found = inspect_image(jpeg(1), 8, 10_000)
    assert (found.status, found.width, found.height, found.ext) == ("ok", 48, 48, "jpg")
    assert found.phash is not None
    assert len(found.phash) == 16


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "not_an_image"),
        (b"<html>", "not_an_image"),
        (jpeg(1)[:900], "decode_error"),
        (jpeg(1, side_px=7), "too_small"),
        (jpeg(1, side_px=101), "too_large"),
    ],
    ids=["empty", "html", "truncated", "small", "large"],
)
def test_inspect_image_says_what_is_wrong(data: bytes, status: str) -> None:
    found = inspect_image(data, 8, 10_000)
    assert found.status == status
    assert found.reason


def test_difference_hash_outlives_a_resize_but_not_another_picture() -> None:
    image = Image.open(io.BytesIO(jpeg(3, 64))).resize((16, 16)).resize((200, 200))
    same = difference_hash(image.resize((90, 90)))
    bits = bin(int(difference_hash(image), 16) ^ int(same, 16)).count("1")
    other = Image.open(io.BytesIO(jpeg(4, 64))).resize((16, 16))
    other_bits = bin(int(difference_hash(image), 16) ^ int(difference_hash(other), 16)).count("1")
    assert bits <= 4 < other_bits


def test_difference_hash_of_16_bits_is_that_of_8() -> None:
    image = Image.open(io.BytesIO(jpeg(3, 64))).convert("L")
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert difference_hash(deep) == difference_hash(image)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("HTTP Error 404: Not Found", "http_4xx"),
        ("HTTP Error 503: Service Unavailable", "http_5xx"),
        ("HTTP Error 304: Not Modified", "http_other"),
        ("<urlopen error timed out>", "timeout"),
        ("<urlopen error [Errno -2] Name or service not known>", "connect"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted_out"),
        ("image too small", "too_small"),
        ("something new", "other"),
    ],
)
def test_status_of_knows_the_fetchers_words(error: str, status: str) -> None:
    assert status_of(error) == status
    assert status in STATUSES


def test_seen_images_tells_the_first_place(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with SeenImages(tmp_path) as seen:
        assert seen.add("ab" * 16, "here") is None
        assert seen.add("ab" * 16, "there") == "here"
        assert seen.add("cd" * 16, "there") is None
    assert list(tmp_path.iterdir()) == []
