"""How much noise is left, estimated from labelled pairs, against a truth that the test has drawn itself."""

import numpy as np
import pytest

from blip_core.errors import ConfigError
from blip_core.noise import NoiseModel, counted, score_ranges

SHAPES = {"true": (20, 1), "random": (1, 20), "hard": (1, 4), "swapped": (1.5, 3)}
CUT = 0.5


def drawn(rng: np.random.Generator, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    return {kind: rng.beta(*SHAPES[kind], size=size) for kind, size in sizes.items()}


def model_of(rng: np.random.Generator, n: int = 200) -> NoiseModel:
    labelled = drawn(rng, dict.fromkeys(SHAPES, n))
    return NoiseModel(labelled, score_ranges(np.concatenate(list(labelled.values())), [CUT]))


def test_estimate_covers_the_share_of_wrong_texts_before_and_after_filtering() -> None:
    rng = np.random.default_rng(1)
    model = model_of(rng)
    texts = drawn(rng, {"true": 1200, "random": 500, "swapped": 300})
    scores, wrong = np.concatenate(list(texts.values())), np.repeat([False, True], [1200, 800])
    kept = scores >= CUT
    noise = model.estimate(counted(scores, model.edges), counted(scores[kept], model.edges))
    assert noise.left is not None
    assert noise.before.low <= 0.4 <= noise.before.high
    assert noise.left.low <= wrong[kept].mean() <= noise.left.high
    assert noise.before.high - noise.before.low < 0.15
    assert noise.left.high < noise.before.low


def test_interval_begins_at_nought_when_no_text_is_wrong() -> None:
    rng = np.random.default_rng(2)
    model = model_of(rng)
    texts = counted(drawn(rng, {"true": 1000})["true"], model.edges)
    noise = model.estimate(texts, texts)
    assert noise.before.low == 0.0
    assert noise.before.high < 0.05


def test_interval_is_wide_when_a_kind_cannot_be_told_from_true_pairs() -> None:
    rng = np.random.default_rng(3)
    labelled = drawn(rng, dict.fromkeys(SHAPES, 200)) | {"swapped": rng.beta(20, 1, size=200)}
    blind = NoiseModel(labelled, score_ranges(np.concatenate(list(labelled.values())), [CUT]))
    texts = counted(drawn(rng, {"true": 900, "random": 100})["true"], blind.edges)
    share = blind.estimate(texts, texts).before
    assert share.high - share.low > 0.5


def test_estimate_is_the_same_when_made_again() -> None:
    rng = np.random.default_rng(4)
    model = model_of(rng)
    texts = counted(drawn(rng, {"true": 300, "random": 300})["random"], model.edges)
    assert model.estimate(texts, texts) == model.estimate(texts, texts)


def test_millions_of_texts_give_the_figures_of_their_shares() -> None:
    model = model_of(np.random.default_rng(5))
    some = np.array([100, 90, 50, 20, 10, 10, 5, 5, 5, 100, 105][: len(model.edges) + 1])
    few, many = model.estimate(some * 10, some), model.estimate(some * 100_000, some)
    assert many.before.value == pytest.approx(few.before.value, abs=0.03)


def test_nothing_kept_has_no_noise_left() -> None:
    model = model_of(np.random.default_rng(6))
    texts = np.ones(len(model.edges) + 1, dtype=int)
    assert model.estimate(texts, texts * 0).left is None


def test_model_asks_for_true_pairs_and_mismatches() -> None:
    with pytest.raises(ConfigError, match="no scores of true pairs"):
        NoiseModel({"random": np.ones(3)}, np.array([0.5]))
    with pytest.raises(ConfigError, match="no scores of mismatches"):
        NoiseModel({"true": np.ones(3)}, np.array([0.5]))


def test_counted_gives_an_edge_to_the_range_above() -> None:
    assert counted(np.array([0.1, 0.5, 0.7]), np.array([0.5])).tolist() == [1, 2]
