"""Intervals over seeds and images: they cover what they say, and pairing makes them narrow."""

import math

import numpy as np
import pytest

from blip_core.errors import ConfigError
from blip_core.intervals import image_weights, mean_metric
from blip_core.seeds import SeedFigure, difference_estimates, mean_estimates

IMAGES, RESAMPLES = 60, 200
WEIGHTS = np.concatenate(list(image_weights(IMAGES, num_resamples=RESAMPLES)))


def _figure(values: np.ndarray) -> SeedFigure:
    """A mean over images (I,) with its resamples."""
    drawn = WEIGHTS @ values / WEIGHTS.sum(axis=1)
    return SeedFigure(value=float(values.mean()), resamples=drawn)


def _world(rng: np.random.Generator, means: tuple[float, ...], seeds: int) -> list:
    """Arms whose true means are known: images, seeds and both together make a model's figures waver."""
    images = rng.normal(0, 1.0, IMAGES)
    common = rng.normal(0, 0.1, seeds)
    return [
        {
            seed: _figure(
                mean + images + common[seed] + rng.normal(0, 0.15) + rng.normal(0, 0.4, IMAGES)
            )
            for seed in range(seeds)
        }
        for mean in means
    ]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_true_mean_and_the_true_difference(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    means, repeats = (0.0, 0.1, 0.3, 0.3), 150
    hits = np.zeros(2)
    for _ in range(repeats):
        arms = _world(rng, means, seeds)
        for mean, estimate in zip(means, mean_estimates(arms), strict=True):
            hits[0] += estimate.low <= mean <= estimate.high
        gains = difference_estimates(arms[1:], arms[0])
        for mean, gain in zip(means[1:], gains, strict=True):
            assert gain is not None
            hits[1] += gain.low <= mean <= gain.high
    covered = hits / (repeats * np.array([4, 3]))
    assert (covered > 0.92).all(), covered
    assert (covered < 0.999).all(), covered


def test_intervals_of_images_alone_miss_the_truth_where_seeds_matter() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(100):
        arms = _world(rng, (0.0, 0.0), 1)
        (gain,) = difference_estimates(arms[1:], arms[0])
        assert gain is not None
        assert not gain.covers_seeds
        missed += gain.is_clear
    assert missed > 20


def test_pairing_makes_the_interval_of_a_difference_narrower_than_that_of_two_means() -> None:
    rng, of_gains, of_means = np.random.default_rng(1), 0.0, 0.0
    for _ in range(20):
        arms = _world(rng, (0.0, 0.1, 0.2, 0.3), 5)
        gain, mean = difference_estimates(arms[1:], arms[0])[0], mean_estimates(arms)[0]
        assert gain is not None
        of_gains += gain.high - gain.low
        of_means += mean.high - mean.low
    unpaired = math.sqrt(2) * of_means
    assert of_gains < 0.65 * unpaired
    values = [[figure.value for figure in arm.values()] for arm in arms]
    assert gain.value == pytest.approx(np.mean(values[1]) - np.mean(values[0]))


def test_one_seed_has_the_interval_of_the_images() -> None:
    metric = mean_metric("m", np.random.default_rng(2).normal(0, 1, IMAGES))
    assert metric.resamples is not None
    figure = SeedFigure(value=metric.value, resamples=metric.resamples)
    (estimate,) = mean_estimates([{7: figure}])
    assert (estimate.value, estimate.low, estimate.high) == (metric.value, metric.low, metric.high)
    assert (estimate.num_seeds, estimate.covers_seeds) == (1, False)


def test_differences_are_of_seeds_that_both_have() -> None:
    rng = np.random.default_rng(3)
    figures = [_figure(rng.normal(0, 1, IMAGES)) for _ in range(4)]
    baseline = {0: figures[0], 1: figures[1]}
    other, gone = {1: figures[2], 2: figures[3]}, {5: figures[3]}
    gain, absent = difference_estimates([other, gone], baseline)
    assert absent is None
    assert gain is not None
    assert gain.value == pytest.approx(figures[2].value - figures[1].value)
    assert gain.num_seeds == 1


def test_equal_models_have_no_difference_and_no_doubt() -> None:
    arm = {seed: _figure(np.arange(IMAGES) + seed) for seed in range(3)}
    (gain,) = difference_estimates([arm], arm)
    assert gain is not None
    assert (gain.value, gain.low, gain.high, gain.is_clear) == (0.0, 0.0, 0.0, False)


def test_an_arm_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model"):
        mean_estimates([{}])
