"""What labelled pairs say about a filter: ROC, calibration, recall and false keeps, with 95 % intervals.

Dimension key: N true pairs, M mismatches, T thresholds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from blip_core.intervals import Metric, auc_metric, itm_auc
from blip_core.rates import Rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Labelled pairs of nearly equal score."""

    mean_score: float
    share_true: float
    low: float
    high: float
    n: int


def kept_rate(scores: np.ndarray, threshold: float) -> Rate:
    """Share of scores (N,) that `threshold` keeps."""
    return Rate(hits=int((scores >= threshold).sum()), n=len(scores))


def filter_metrics(scores_of: Mapping[str, np.ndarray], threshold: float) -> list[Metric]:
    """Figures of a filter at a threshold, from the scores of labelled pairs by kind, `true` among them.

    `filter_recall` is the share of true pairs kept, `filter_false_keep_<kind>` of mismatches; `filter_auc_<kind>`
    tells true pairs from a kind, `filter_auc` from all. `filter_precision` is the share of true ones among kept
    labelled pairs, as if true ones and each kind of mismatch were equally many halves.
    """
    true = scores_of["true"]
    wrongs = {kind: scores for kind, scores in scores_of.items() if kind != "true"}
    recall = kept_rate(true, threshold)
    metrics = [_rate_metric("filter_recall", recall)]
    for kind, scores in wrongs.items():
        metrics.append(_rate_metric(f"filter_false_keep_{kind}", kept_rate(scores, threshold)))
    for kind, scores in wrongs.items():
        metrics.append(_auc(f"filter_auc_{kind}", true, scores))
    metrics.append(_auc("filter_auc", true, np.concatenate(list(wrongs.values()))))
    metrics.append(_precision(true, list(wrongs.values()), threshold))
    return metrics


def roc(true: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds (T,), highest first, with the share of true (N,) and wrong (M,) scores that each keeps."""
    thresholds = np.unique(np.concatenate([true, wrong]))[::-1]
    kept_true = (true[None] >= thresholds[:, None]).mean(axis=1)
    kept_wrong = (wrong[None] >= thresholds[:, None]).mean(axis=1)
    return thresholds, kept_true, kept_wrong


def calibration(scores: np.ndarray, is_true: np.ndarray, num_bins: int = 10) -> list[Bin]:
    """Equally wide bins of scores in [0, 1] with the share of true ones in each; empty bins are left out.

    The share depends on how many labelled pairs are true: a calibrated filter lies on the diagonal only where they
    are as frequent as among the texts it was trained on.
    """
    place = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    bins = []
    for index in np.unique(place):
        here = place == index
        rate = Rate(hits=int(is_true[here].sum()), n=int(here.sum()))
        low, high = rate.interval()
        bins.append(
            Bin(
                mean_score=float(scores[here].mean()),
                share_true=rate.value,
                low=low,
                high=high,
                n=rate.n,
            )
        )
    return bins


def _rate_metric(name: str, rate: Rate) -> Metric:
    low, high = rate.interval()
    return Metric(name, rate.value, rate.n, low, high)


def _auc(name: str, true: np.ndarray, wrong: np.ndarray, num_resamples: int = 1000) -> Metric:
    """AUC with a bootstrap interval over true pairs and mismatches, each drawn by themselves."""
    if len(true) == len(wrong):
        return auc_metric(name, true, wrong)
    rng = np.random.default_rng(0)
    drawn = [
        itm_auc(rng.choice(true, len(true)), rng.choice(wrong, len(wrong)))
        for _ in range(num_resamples)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(name, itm_auc(true, wrong), len(true) + len(wrong), float(low), float(high))


def _precision(true: np.ndarray, wrongs: list[np.ndarray], threshold: float) -> Metric:
    """Recall over recall plus the mean false keep, with an interval by drawing both from their posteriors."""
    rng = np.random.default_rng(0)
    recall, *false = (kept_rate(scores, threshold) for scores in (true, *wrongs))
    keeps = np.mean([rate.value for rate in false])
    value = recall.value / (recall.value + keeps) if recall.value + keeps else float("nan")
    posterior = [
        rng.beta(rate.hits + 0.5, rate.n - rate.hits + 0.5, 4000) for rate in (recall, *false)
    ]
    drawn = posterior[0] / (posterior[0] + np.mean(posterior[1:], axis=0))
    low, high = np.percentile(drawn, [2.5, 97.5])
    n = recall.n + sum(rate.n for rate in false)
    return Metric("filter_precision", float(value), n, float(low), float(high))
