"""Figures of a filter from labelled pairs."""

import math

import numpy as np
import pytest

from blip_core.filter_figures import calibration, filter_metrics, roc
from blip_core.rates import Rate

TRUE = np.array([0.9, 0.8, 0.7, 0.2])
WRONG = {"random": np.array([0.1, 0.1, 0.2, 0.3]), "hard": np.array([0.6, 0.75, 0.1, 0.4])}


def test_filter_metrics_are_the_counts_at_the_threshold() -> None:
    found = {m.name: m for m in filter_metrics({"true": TRUE, **WRONG}, 0.5)}
    assert found["filter_recall"].value == 0.75
    assert found["filter_false_keep_random"].value == 0.0
    assert found["filter_false_keep_hard"].value == 0.5
    assert found["filter_precision"].value == pytest.approx(0.75 / (0.75 + 0.25))
    assert found["filter_auc_random"].value == pytest.approx(14.5 / 16)
    assert found["filter_auc"].value == pytest.approx((14.5 + 12) / 32)
    for metric in found.values():
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low <= metric.value <= metric.high


def test_no_false_keep_has_an_interval_above_nought() -> None:
    rate = Rate(hits=0, n=40)
    low, high = rate.interval()
    assert low == 0.0
    assert high == pytest.approx(0.0876, abs=1e-3)  # Wilson
    assert math.isnan(Rate(hits=0, n=0).value)


def test_roc_rises_from_the_highest_threshold_to_everything() -> None:
    thresholds, kept_true, kept_wrong = roc(TRUE, WRONG["hard"])
    assert thresholds[0] == 0.9
    assert (np.diff(kept_true) >= 0).all()
    assert (np.diff(kept_wrong) >= 0).all()
    assert kept_true[-1] == kept_wrong[-1] == 1.0


def test_calibration_counts_the_true_ones_of_every_bin() -> None:
    scores = np.array([0.05, 0.07, 0.95, 1.0])
    low, high = calibration(scores, np.array([False, True, True, True]))
    assert (low.n, low.share_true) == (2, 0.5)
    assert (high.n, high.share_true) == (2, 1.0)
    assert high.mean_score == pytest.approx(0.975)
