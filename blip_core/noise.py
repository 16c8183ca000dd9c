"""How much noise a filter leaves: the scores of unlabelled texts as a mixture of those of labelled ones.

The scores of the texts are taken for a mixture of the scores of true pairs and of mismatches of several kinds, each
known from pairs whose truth is known. The weights of the mixture say how many texts of each kind there are; with them
each range of scores has its share of noise, and so has whatever was kept.

Assumed: a true text of the stream scores like a true labelled one, and a wrong text like one of the kinds of
mismatch; and among texts of nearly equal score, which ones were kept has nothing to do with their truth. Where the
scores of a kind of mismatch do not differ from those of true pairs, the data cannot tell them apart, and the interval
is wide.

Dimension key: K kinds, B ranges of scores, R draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blip_core.config import require

NUM_RANGES = 10
MOST_TEXTS = 5000
"""Texts that the chains weigh: of more, so many stand for all, which costs +-0.01 at most and keeps the chains short."""
_CHAINS, _SWEEPS, _WARM, _THIN = 48, 1200, 400, 10
NUM_DRAWS = _CHAINS * (_SWEEPS - _WARM) // _THIN
_PRIOR_TRUE, _PRIOR_WRONG = 1.0, 0.05
"""Of the weights: any kind of mismatch may well be absent."""
_PRIOR_RANGES = 1.0
"""Labelled pairs that are imagined in each kind, spread over all ranges: no count of zero is taken for impossible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Of a group of texts: the share that does not describe its image, before and after filtering."""

    before: Share
    left: Share | None
    """Among the kept; None when nothing was kept."""


def score_ranges(scores: np.ndarray, cuts: Sequence[float] = ()) -> np.ndarray:
    """Inner edges of about NUM_RANGES ranges that hold equally many of the scores (N,), and `cuts`."""
    require(len(scores) > 0, "no scores to lay ranges over")
    inner = np.quantile(scores, np.arange(1, NUM_RANGES) / NUM_RANGES)
    return np.unique(np.concatenate([inner, np.asarray(cuts, dtype=np.float64)]))


def counted(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(N,) scores -> how many lie in each range (B,); an edge belongs to the range above it."""
    return np.bincount(np.searchsorted(edges, scores, side="right"), minlength=len(edges) + 1)


class NoiseModel:
    """What labelled pairs say of how scores are distributed, kind by kind."""

    def __init__(
        self, scores_of: Mapping[str, np.ndarray], edges: np.ndarray, *, seed: int = 0
    ) -> None:
        """`scores_of` are the scores of labelled pairs by kind, `true` among them; `edges` are `score_ranges`."""
        require("true" in scores_of, "no scores of true pairs")
        require(len(scores_of) > 1, "no scores of mismatches")
        self.edges, self._seed = edges, seed
        kinds = ["true", *(kind for kind in scores_of if kind != "true")]
        self._counts = np.stack([counted(scores_of[kind], edges) for kind in kinds])

    def noise_of_ranges(self, texts: np.ndarray) -> np.ndarray:
        """Counts of all texts (B,) -> draws of the share of noise in each range, (R, B).

        Gibbs sampling of the mixture: texts are given to kinds, then weights and each kind's distribution are drawn
        from labelled pairs and the texts given to them.
        """
        rng = np.random.default_rng(self._seed)
        total = texts.sum()
        require(total > 0, "no texts to estimate the noise of")
        observed = np.round(texts * min(1.0, MOST_TEXTS / total)).astype(np.int64)
        spread = _PRIOR_RANGES * (0.5 / len(texts) + 0.5 * texts / total)
        prior = self._counts + spread
        alpha = np.full(len(prior), _PRIOR_WRONG)
        alpha[0] = _PRIOR_TRUE
        weights = _dirichlet(rng, np.ones((_CHAINS, len(prior))))
        kinds = _dirichlet(rng, np.broadcast_to(prior, (_CHAINS, *prior.shape)))
        drawn = []
        for sweep in range(_SWEEPS):
            joint = (weights[:, :, None] * kinds).swapaxes(1, 2)
            share = joint / joint.sum(axis=2, keepdims=True)
            if sweep >= _WARM and sweep % _THIN == 0:
                drawn.append(1.0 - share[:, :, 0])
            given = rng.multinomial(observed, share).swapaxes(1, 2)
            weights = _dirichlet(rng, given.sum(axis=2) + alpha)
            kinds = _dirichlet(rng, given + prior)
        return np.concatenate(drawn)

    def estimate(self, texts: np.ndarray, kept: np.ndarray) -> Noise:
        """Counts of a group's texts and of those kept, (B,) each -> its noise."""
        noise = self.noise_of_ranges(texts)
        return Noise(
            before=share_of(noise, texts), left=share_of(noise, kept) if kept.sum() else None
        )


def _dirichlet(rng: np.random.Generator, alpha: np.ndarray) -> np.ndarray:
    """Draws along the last axis."""
    gamma = np.maximum(rng.standard_gamma(alpha), 1e-300)
    drawn: np.ndarray = gamma / gamma.sum(axis=-1, keepdims=True)
    return drawn


def share_of(noise: np.ndarray, counts: np.ndarray) -> Share:
    """The noise (R, B) among texts that lie in the ranges so often (B,)."""
    return share_of_draws(noise @ (counts / counts.sum()), int(counts.sum()))


def share_of_draws(draws: np.ndarray, num_texts: int) -> Share:
    """Draws (R,) of a share of so many texts -> their median and their shortest 95 % interval.

    The shortest one, because a share near 0 has its likeliest value at the end: then the interval begins at 0, as one
    does that begins below one text.
    """
    drawn = np.sort(draws)
    size = int(np.ceil(0.95 * len(drawn)))
    widths = drawn[size - 1 :] - drawn[: len(drawn) - size + 1]
    first = int(widths.argmin())
    low, high = float(drawn[first]), float(drawn[first + size - 1])
    one_text = 1.0 / num_texts
    low = 0.0 if first == 0 or low < one_text else low
    high = 1.0 if first == len(widths) - 1 or high > 1.0 - one_text else high
    return Share(value=float(np.median(drawn)), low=low, high=high)


def rate_draws(hits: int, n: int, *, floor: float = 0.0, seed: int = 0) -> np.ndarray:
    """Draws (R,) of the share of wrong texts, of which `hits` of `n` were found out by a sign that true texts show too,
    with probability `floor`.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.beta(hits + 0.5, n - hits + 0.5, size=NUM_DRAWS)
    noise: np.ndarray = np.clip((drawn - floor) / (1.0 - floor), 0.0, 1.0)
    return noise
