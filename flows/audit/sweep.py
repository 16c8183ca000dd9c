"""Another threshold, before anybody decides by it: how much it keeps, and how much noise it would leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blip_core.noise import Share, share_of_draws
from flows.steps.audit import (
    CanaryScores,
    canary_scores,
    cut_of,
    half_of_each,
    noise_model,
    range_counts,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """What a threshold does to the texts of a source."""

    source: str
    threshold: float
    texts: int
    kept: int
    noise: Share | None
    """Share of wrong texts among the kept; None without canaries, and where nothing is kept."""


def sweep(
    con: Any, round: int, thresholds: Sequence[float], number: str = "itm_prob"
) -> list[SweepPoint]:
    """Points by source and threshold, from one scan of the round's texts."""
    cuts = np.unique(np.asarray(thresholds, dtype=np.float64))
    canaries = canary_scores(con, round)
    model = None
    if canaries is not None and canaries.number == number:
        model = noise_model(canaries, cut_of(con, round, number))
    ranges = model.edges if model is not None else np.array([])
    edges = np.union1d(cuts, ranges)
    starts = np.concatenate([[-np.inf], edges])
    coarse = np.searchsorted(ranges, starts, side="right")
    points = []
    known: dict[str, np.ndarray] = {}
    for source, (texts, _) in range_counts(con, round, number, edges).items():
        in_range = np.bincount(coarse, texts, minlength=len(ranges) + 1)
        for cut in cuts:
            above = np.bincount(
                coarse, np.where(starts >= cut, texts, 0), minlength=len(ranges) + 1
            ).astype(int)
            noise = None
            if model is not None and canaries is not None and above.sum():
                if source not in known:
                    known[source] = model.noise_of_ranges(in_range.astype(int))
                noise = _noise(canaries, source, known[source], above, float(cut))
            points.append(
                SweepPoint(
                    source=source,
                    threshold=float(cut),
                    texts=int(texts.sum()),
                    kept=int(above.sum()),
                    noise=noise,
                )
            )
    return points


def _noise(
    canaries: CanaryScores, source: str, noise: np.ndarray, kept: np.ndarray, cut: float
) -> Share:
    """The noise that a cut leaves, as the audit estimates it for the source."""
    draws = noise @ (kept / kept.sum())
    if source == "synthetic" and len(canaries.written):
        rate = canaries.wrong_written(cut)
        draws = half_of_each(draws, canaries.written_draws(rate)) if rate.n else draws
    return share_of_draws(draws, int(kept.sum()))
