"""Figures with 95 % bootstrap intervals: whole images are drawn again, with all their texts.

Texts of one image are alike, so that drawing texts or pairs by themselves would give intervals too narrow.
Every draw depends on the seed only, so that equal inputs give equal figures.

Dimension key: I images, N texts or pairs, R resamples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

NUM_RESAMPLES = 1000
_BLOCK = 1 << 20
"""Weights that are in memory at once."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""A figure as a function of the images' weights: (R, I) -> (R,)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure, what it rests on, and its 95 % bootstrap interval where one was computed."""

    name: str
    value: float
    n: int
    """Images, texts or pairs that the figure is a mean over."""
    low: float | None = None
    high: float | None = None
    resamples: np.ndarray | None = field(default=None, compare=False, repr=False)
    """(R,) The figure on each resample, NaN where it is not defined. Resample r of every figure over equally many
    images draws the same images, so that figures of two models can be compared resample by resample."""


def measured(
    name: str,
    statistic: Statistic,
    num_images: int,
    *,
    n: int | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Metric:
    """Return a figure (`statistic` of equal weights) with its interval; `n` defaults to `num_images`."""
    value = float(statistic(np.ones((1, num_images)))[0])
    drawn = resampled(statistic, num_images, num_resamples=num_resamples, seed=seed)
    low, high = percentiles(drawn)
    return Metric(name, value, num_images if n is None else n, low, high, drawn)


def interval(
    statistic: Statistic, num_images: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % points of `statistic` over resamples of the images.

    A resample for which the figure is not defined (no drawn image has a text) is left out.
    """
    return percentiles(resampled(statistic, num_images, num_resamples=num_resamples, seed=seed))


def resampled(
    statistic: Statistic, num_images: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return `statistic` of every resample of the images, (R,)."""
    blocks = image_weights(num_images, num_resamples=num_resamples, seed=seed)
    return np.concatenate([statistic(weights) for weights in blocks])


def percentiles(drawn: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % points of resampled figures (R,); what is not finite is left out."""
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
    return float(low), float(high)


def image_weights(
    num_images: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield blocks (R, I) of how often each image was drawn; `num_resamples` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // num_images)
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        drawn = rng.integers(0, num_images, (size, num_images))
        drawn += np.arange(size)[:, None] * num_images
        counts = np.bincount(drawn.ravel(), minlength=size * num_images)
        yield counts.reshape(size, num_images).astype(np.float64)


def weighted_mean(values: np.ndarray, images: np.ndarray, num_images: int) -> Statistic:
    """Return the mean of values (N,) as a statistic; `images` (N,) says whose each value is."""
    sums = np.bincount(images, values, minlength=num_images)
    counts = np.bincount(images, minlength=num_images).astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            mean: np.ndarray = (weights @ sums) / (weights @ counts)
        return mean

    return statistic


def mean_metric(name: str, values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES) -> Metric:
    """Return the mean of values (I,), one for each image, with its interval."""
    statistic = weighted_mean(values, np.arange(len(values)), len(values))
    return measured(name, statistic, len(values), num_resamples=num_resamples)


def itm_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive (N,) is above a negative (M,); equal values count half."""
    below = np.sort(negative)
    wins = np.searchsorted(below, positive, "left") + np.searchsorted(below, positive, "right")
    return float(wins.mean() / 2.0 / len(negative))


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the area below the steps of precision over recall, of scores (N,) and (M,).

    Equal scores are one step. Scores that say nothing give the share of positives, N / (N + M).
    """
    images = np.zeros(len(positive) + len(negative), dtype=np.int64)
    return float(_precision(positive, negative, images)(np.ones((1, 1)))[0])


def auc_metric(
    name: str,
    positive: np.ndarray,
    negative: np.ndarray,
    images: np.ndarray | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Metric:
    """Return `itm_auc` of paired scores (N,) and (N,) with its interval.

    `images` (N,) says whose each pair is; without it every pair is an image of its own.
    """
    rows, num_images = _numbered(images, len(positive))
    order = np.argsort(negative, kind="stable")
    below = negative[order]
    left, right = (np.searchsorted(below, positive, side) for side in ("left", "right"))

    def statistic(weights: np.ndarray) -> np.ndarray:
        of_positive, of_negative = weights[:, rows], weights[:, rows[order]]
        total = np.zeros((len(weights), len(negative) + 1))
        np.cumsum(of_negative, axis=1, out=total[:, 1:])
        wins = of_positive * (total[:, left] + total[:, right])
        auc: np.ndarray = wins.sum(axis=1) / 2.0 / (of_positive.sum(axis=1) * total[:, -1])
        return auc

    return measured(name, statistic, num_images, n=len(positive), num_resamples=num_resamples)


def precision_metric(
    name: str,
    positive: np.ndarray,
    negative: np.ndarray,
    images: np.ndarray | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Metric:
    """Return `average_precision` of paired scores (N,) and (N,) with its interval, as `auc_metric`."""
    rows, num_images = _numbered(images, len(positive))
    statistic = _precision(positive, negative, np.concatenate([rows, rows]))
    return measured(name, statistic, num_images, n=len(positive), num_resamples=num_resamples)


def _numbered(images: np.ndarray | None, num_pairs: int) -> tuple[np.ndarray, int]:
    """Images counted from 0 without gaps, (N,), and how many there are."""
    if images is None:
        return np.arange(num_pairs), num_pairs
    known, rows = np.unique(images, return_inverse=True)
    return rows, len(known)


def _precision(positive: np.ndarray, negative: np.ndarray, images: np.ndarray) -> Statistic:
    """Average precision as a statistic; `images` of the positives, then of the negatives."""
    scores = np.concatenate([positive, negative])
    order = np.argsort(-scores, kind="stable")
    is_positive = order < len(positive)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of equal scores

    def statistic(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, images[order]]
        taken = np.cumsum(drawn, axis=1)[:, ends]
        found = np.cumsum(drawn * is_positive, axis=1)[:, ends]
        precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
        steps = np.diff(found, axis=1, prepend=0.0)
        area: np.ndarray = (precision * steps).sum(axis=1) / found[:, -1]
        return area

    return statistic
