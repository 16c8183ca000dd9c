import math

import pytest

from blip_core import GeneratedCaption
from flows.caption_status import caption_status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("a dog on a beach", "ok"),
        ("dog", "ok"),
        ("very very", "ok"),
        ("new york new york new york", "ok"),
        ("dog dog dog", "degenerate"),
        (" Dog dog\tDOG dog dog ", "degenerate"),
        ("\U0001f389 \U0001f389 \U0001f389", "degenerate"),
        ("", "empty"),
        (" \t\n\u00a0", "empty"),
    ],
)
def test_caption_status_names_what_is_wrong(text: str, status: str) -> None:
    assert caption_status(GeneratedCaption(text, 5, -1.0, "length")) == status


def test_caption_of_a_model_that_gave_no_number_is_its_error() -> None:
    assert caption_status(GeneratedCaption("", 0, math.nan, "nan")) == "model_error"
