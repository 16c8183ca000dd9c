"""Figures of several trainings that differ in their seed, with intervals that cover seeds and held-out images.

An arm is one way to make a training set; it is trained with several seeds, and all models are measured on the same
images. What a figure would be with other seeds and other images is uncertain from both sides:

    variance of an arm's mean = (spread between seeds)^2 / S + (spread of the mean between resamples of the images)^2

The spread between seeds is taken to be the same in all arms and estimated from all of them together, as an analysis of
variance does: three seeds of one arm alone say little. The interval is Student's, with Satterthwaite's degrees of freedom.
A difference to the baseline is taken seed by seed and resample by resample, so that what an image or a seed does to both
arms cancels out. A model's figure on so many images already wavers with them, which the spread between seeds sees too:
that part is counted twice, and the intervals are a little too wide rather than too narrow.

Dimension key: S seeds, R resamples of the images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blip_core.config import require

ALIKE = 0.5
"""Correlation of two arms' differences to one baseline that they share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedFigure:
    """One figure of one model: on the held-out images, and on resamples of them."""

    value: float
    resamples: np.ndarray
    """(R,) on the same resamples of the same images for every model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    value: float
    low: float
    high: float
    num_seeds: int
    covers_seeds: bool
    """False with one seed in every arm: then the interval is that of the images alone."""

    @property
    def is_clear(self) -> bool:
        """Of a difference: whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


Arm = Mapping[int, SeedFigure]
"""seed -> the figure of its model."""


def mean_estimates(arms: Sequence[Arm]) -> list[Estimate]:
    """Return each arm's mean over its seeds; ConfigError for an arm without a model."""
    require(all(arms), "an arm has no model")
    return _estimates(arms, shared=0.0)


def difference_estimates(arms: Sequence[Arm], baseline: Arm) -> list[Estimate | None]:
    """Return each arm's mean difference to the baseline over the seeds that both have; None without such a seed.

    Arms are those beside the baseline: what they have in common through it is allowed for.
    """
    differences = [
        {
            seed: SeedFigure(
                value=figure.value - baseline[seed].value,
                resamples=figure.resamples - baseline[seed].resamples,
            )
            for seed, figure in arm.items()
            if seed in baseline
        }
        for arm in arms
    ]
    found = iter(_estimates([arm for arm in differences if arm], shared=ALIKE))
    return [next(found) if arm else None for arm in differences]


def _estimates(arms: Sequence[Arm], shared: float) -> list[Estimate]:
    seeds_variance, freedom = _pooled(arms, shared)
    return [_estimate(arm, seeds_variance, freedom) for arm in arms]


def _pooled(arms: Sequence[Arm], shared: float) -> tuple[float, float]:
    """Variance between seeds within an arm, and its degrees of freedom; 0 of them with one seed everywhere.

    Deviations of arms that correlate by `shared` say less together than they would alone.
    """
    squares = sum(float(np.var(_values(arm))) * len(arm) for arm in arms)
    freedom = float(sum(len(arm) - 1 for arm in arms))
    if not freedom:
        return 0.0, 0.0
    repeated = sum(len(arm) > 1 for arm in arms)
    return squares / freedom, freedom / (1.0 + (repeated - 1) * shared**2)


def _estimate(arm: Arm, seeds_variance: float, freedom: float) -> Estimate:
    value = float(_values(arm).mean())
    drawn = np.mean([figure.resamples for figure in arm.values()], axis=0)
    drawn = drawn[np.isfinite(drawn)]
    if not freedom:
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Estimate(
            value=value, low=float(low), high=float(high), num_seeds=len(arm), covers_seeds=False
        )
    from scipy.special import stdtrit

    of_seeds, of_images = seeds_variance / len(arm), float(np.var(drawn))
    total = of_seeds + of_images
    half = 0.0
    if total:
        effective = math.inf if not of_seeds else freedom * (total / of_seeds) ** 2
        half = float(stdtrit(effective, 0.975)) * math.sqrt(total)
    return Estimate(
        value=value, low=value - half, high=value + half, num_seeds=len(arm), covers_seeds=True
    )


def _values(arm: Arm) -> np.ndarray:
    return np.array([figure.value for figure in arm.values()])
