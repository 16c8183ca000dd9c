import io

import numpy as np
import pytest
from PIL import Image
from web_world import jpeg

from storage.intake.fetching.errors import NO_ANSWER, is_transient
from storage.intake.images import inspect_image
from storage.intake.looks import looks_of
from storage.intake.outcomes import STATUSES, outcome_of
from storage.intake.seen import SeenImages


def test_inspect_image_measures_a_good_one() -> None:
    found = inspect_image(jpeg(1), 8, 10_000)
    assert (found.status, found.width, found.height, found.ext) == ("ok", 48, 48, "jpg")
    assert found.looks is not None
    assert len(found.looks.phash) == 16


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "not_an_image"),
        (b"<html>", "not_an_image"),
        (jpeg(1)[:900], "decode_error"),
        (jpeg(1, side_px=7), "too_small"),
        (jpeg(1, side_px=101), "too_many_pixels"),
    ],
    ids=["empty", "html", "truncated", "small", "large"],
)
def test_inspect_image_says_what_is_wrong(data: bytes, status: str) -> None:
    found = inspect_image(data, 8, 10_000)
    assert found.status == status
    assert found.reason


def test_looks_of_16_bits_are_those_of_8() -> None:
    image = Image.open(io.BytesIO(jpeg(3, 64))).convert("L")
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert looks_of(deep).to_bytes() == looks_of(image).to_bytes()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("http_4xx: 404 Not Found", ("http_4xx", "404 Not Found")),
        ("opted_out: X-Robots-Tag: noai", ("opted_out", "X-Robots-Tag: noai")),
        ("bad_url: a\nb", ("bad_url", "a\nb")),
        ("image too small", ("too_small", "image too small")),
        ("Image decoding error", ("not_an_image", "Image decoding error")),
        ("something: new", ("other", "something: new")),
    ],
)
def test_outcome_of_knows_the_fetchers_words(error: str, outcome: tuple[str, str]) -> None:
    assert outcome_of(error) == outcome
    assert outcome[0] in STATUSES


@pytest.mark.parametrize(
    ("status", "reason", "may"),
    [
        ("http_4xx", "404 Not Found", False),
        ("http_4xx", "429 Too Many Requests, retry after 3 s", True),
        ("http_5xx", "503 Service Unavailable", True),
        ("dns", "a.test: Name or service not known", False),
        ("dns", f"a.test: {NO_ANSWER}", True),
        ("timeout", "", True),
        ("connect", "", True),
        ("lost", "", True),
        ("opted_out", "X-Robots-Tag: noai", False),
        ("robots", "robots.txt answers 503, which is taken as a no", False),
        ("blocked_address", "", False),
        ("ok", "", False),
    ],
)
def test_only_what_may_pass_is_asked_for_again(status: str, reason: str, may: bool) -> None:
    assert is_transient(status, reason) == may


def test_seen_images_tells_the_first_place(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with SeenImages(tmp_path) as seen:
        assert seen.add("ab" * 16, "here") is None
        assert seen.add("ab" * 16, "there") == "here"
        assert seen.add("cd" * 16, "there") is None
    assert list(tmp_path.iterdir()) == []
