"""How varied texts are, counted by hand."""

import pytest

from blip_core import caption_diversity
from blip_core.errors import ConfigError


def _figures(texts: list[str]) -> dict[str, float]:
    return {metric.name: metric.value for metric in caption_diversity(texts)}


def test_diversity_counts_words_texts_and_ngrams() -> None:
    figures = _figures(["A red cat.", "a red cat", "a blue dog runs", "a red dog"])
    assert figures["distinct_share"] == 3 / 4, "case and punctuation do not make another text"
    assert figures["vocabulary"] == 6
    assert figures["distinct_1"] == 6 / 13
    # a red, red cat (twice), a blue, blue dog, dog runs, red dog: 6 of 9
    assert figures["distinct_2"] == 6 / 9
    assert figures["distinct_3"] == 4 / 5
    assert figures["length_mean"] == 13 / 4
    assert figures["length_p50"] == 3


def test_diversity_of_one_text_for_everything_is_as_low_as_can_be() -> None:
    same = _figures(["many red circles on blue"] * 50)
    varied = _figures([f"thing {i} beside place {i * 7}" for i in range(50)])
    assert same["distinct_share"] == 1 / 50
    assert same["self_bleu"] == pytest.approx(1.0)
    assert varied["distinct_share"] == 1.0
    assert varied["self_bleu"] < 0.3
    assert same["distinct_2"] < varied["distinct_2"] / 10


def test_diversity_of_texts_without_words_is_zero_and_of_no_text_an_error() -> None:
    figures = _figures(["", "..."])
    assert figures["vocabulary"] == figures["distinct_2"] == figures["length_mean"] == 0
    assert "self_bleu" not in _figures(["a lone text"])
    with pytest.raises(ConfigError, match="no captions"):
        caption_diversity([])
