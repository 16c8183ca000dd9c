from collections.abc import Callable

import numpy as np
import pytest

from blip_core import average_precision, itm_auc
from blip_core.intervals import (
    auc_metric,
    image_weights,
    interval,
    mean_metric,
    precision_metric,
    weighted_mean,
)

Figure = Callable[[np.ndarray, np.ndarray], float]


def _draws(num_images: int, num_resamples: int) -> np.ndarray:
    """Images of every resample, in one go."""
    return np.random.default_rng(0).integers(0, num_images, (num_resamples, num_images))


def _slow_interval(
    figure: Figure, positive: np.ndarray, negative: np.ndarray, images: np.ndarray, resamples: int
) -> list[float]:
    """Percentiles of a figure over scores copied out, image by drawn image."""
    drawn = []
    for draw in _draws(len(np.unique(images)), resamples):
        rows = np.concatenate([np.flatnonzero(images == image) for image in draw])
        drawn.append(figure(positive[rows], negative[rows]))
    return list(np.percentile(drawn, [2.5, 97.5]))


def _slow_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Precision at every distinct threshold, times the recall that it adds."""
    area = recall_before = 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        found, wrong = (positive >= threshold).sum(), (negative >= threshold).sum()
        recall = found / len(positive)
        area += (recall - recall_before) * found / (found + wrong)
        recall_before = recall
    return area


def test_image_weights_are_the_same_draws_whatever_the_blocks() -> None:
    blocks = list(image_weights(3000, num_resamples=800))
    assert len(blocks) > 1
    expected = [np.bincount(draw, minlength=3000) for draw in _draws(3000, 800)]
    np.testing.assert_array_equal(np.concatenate(blocks), expected)


def test_itm_auc_of_equal_scores_counts_half() -> None:
    assert itm_auc(np.ones(3), np.ones(5)) == 0.5
    assert itm_auc(np.array([1.0, 2.0]), np.array([1.0])) == 0.75


def test_average_precision_equals_its_definition_with_ties() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(2, 9, 40), rng.integers(0, 7, 30)
    found = average_precision(positive, negative)
    assert found == pytest.approx(_slow_precision(positive, negative))
    assert 0.6 < found < 1.0
    assert average_precision(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert average_precision(np.ones(6), np.ones(6)) == 0.5


@pytest.mark.parametrize(
    ("metric", "figure"),
    [(auc_metric, itm_auc), (precision_metric, _slow_precision)],
    ids=["auc", "precision"],
)
def test_interval_of_scores_equals_copying_drawn_images_out(
    metric: Callable[..., object], figure: Figure
) -> None:
    rng = np.random.default_rng(1)
    images = np.repeat([3, 4, 6, 9, 11, 12, 20, 31], rng.integers(1, 6, 8))  # gaps, other counts
    positive = rng.integers(2, 9, len(images)).astype(float)
    negative = rng.integers(0, 7, len(images)).astype(float)
    found = metric("x", positive, negative, images, num_resamples=60)
    assert found.value == pytest.approx(figure(positive, negative))
    assert found.n == len(images)
    slow = _slow_interval(figure, positive, negative, np.unique(images, return_inverse=True)[1], 60)
    assert [found.low, found.high] == pytest.approx(slow)


def test_interval_counts_images_and_not_their_texts_which_are_alike() -> None:
    hits = np.random.default_rng(2).integers(0, 2, 200).astype(float)
    of_image = mean_metric("x", hits)
    images = np.repeat(np.arange(200), 5)
    by_image = interval(weighted_mean(np.repeat(hits, 5), images, 200), 200)
    assert by_image == pytest.approx((of_image.low, of_image.high))
    as_if_apart = mean_metric("x", np.repeat(hits, 5))
    assert as_if_apart.high - as_if_apart.low < 0.6 * (by_image[1] - by_image[0])


def test_interval_leaves_out_resamples_without_any_text() -> None:
    low, high = interval(weighted_mean(np.array([0.25, 0.75]), np.array([0, 1]), 6), 6)
    assert (low, high) == (0.25, 0.75)


def test_mean_metric_has_a_bootstrap_interval_of_the_right_width() -> None:
    values = np.random.default_rng(1).normal(size=400)
    metric = mean_metric("x", values)
    half_width = 1.96 * values.std() / 20
    assert (metric.high - metric.low) / 2 == pytest.approx(half_width, rel=0.15)
    assert metric.low < metric.value < metric.high


def test_mean_metric_of_one_image_is_certain() -> None:
    metric = mean_metric("x", np.array([0.3]))
    assert (metric.value, metric.low, metric.high, metric.n) == (0.3, 0.3, 0.3, 1)
