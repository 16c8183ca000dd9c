"""The comparison as data, read from a lake: each policy's figures over its seeds, and their difference to the baseline.

Nothing is trained here; what `bootstrap compare` has left in `arms`, `metrics` and `arm_resamples` is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blip_core.seeds import Arm as SeedArm
from blip_core.seeds import Estimate, SeedFigure, difference_estimates, mean_estimates
from storage import Lake, connect

BASELINE = "raw"
METRICS = {
    "mean_recall": "mean recall",
    "i2t_r1": "image to text, R@1",
    "t2i_r1": "text to image, R@1",
    "itm_auc_random": "ITM AUC, random negatives",
    "itm_auc_hard": "ITM AUC, hard negatives",
    "cider": "CIDEr",
    "bleu4": "BLEU-4",
    "caption_truth": "captions true of the picture",
}
"""The figures shown, in order; every one is better when higher. One that was not measured is left out."""

UNBOUNDED = ("cider",)
"""Metrics that may be above 1; all others are shares or like shares."""

# Arms of older programs do not say how their captions were decoded: as the round's.
_ARMS = """
SELECT a.round, policy, params, label, generation, seed, steps, model_id, num_web, num_synthetic, num_human,
    dropped_web, dropped_synthetic, a.settings,
    json_extract_string(r.settings, '$.caption.decoding') AS own_decoding,
    coalesce(a.decoding, CASE WHEN num_synthetic > 0 THEN own_decoding END) AS decoding
FROM arms a
LEFT JOIN rounds r ON r.round = a.round
WHERE ($round IS NULL OR a.round = $round) AND ($steps IS NULL OR steps = $steps)
ORDER BY a.round, steps, seed
"""
_NOISE = """
SELECT generation, count(*) FILTER (NOT kept) / count(*) AS ratio
FROM (
    SELECT round, generation, source, kept FROM decisions
    UNION ALL SELECT round, generation, source, kept FROM variant_decisions
)
WHERE round = $round AND source = 'synthetic' AND list_contains($generations, generation)
GROUP BY generation
"""
# Rows of an arm that two policies share are there once.
_FIGURES = """
SELECT DISTINCT model_id, metric, value, n FROM metrics
WHERE dataset = 'arms' AND round = $round AND list_contains($models, model_id)
"""
_RESAMPLES = """
SELECT model_id, metric, list(value ORDER BY resample) AS resamples FROM arm_resamples
WHERE round = $round AND list_contains($models, model_id) GROUP BY model_id, metric
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedFigure:
    """One metric of one policy."""

    metric: str
    label: str
    mean: Estimate
    """Over the policy's seeds."""
    gain: Estimate | None
    """Difference to the baseline, seed by seed; None for the baseline itself and without a seed in common."""
    by_seed: tuple[tuple[int, float], ...]
    """(seed, value) of each model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedPolicy:
    """One row of the table."""

    policy: str
    params: str
    """As a JSON object."""
    label: str
    """Policy, and its parameters that are not the default, as the command takes them."""
    name: str
    """What sentences call it: the label, and where decodings are compared the one of its captions."""
    generation: str
    decoding: str | None
    """How the captions that it decided on were decoded; None where it keeps none, however they were."""
    noise_ratio: float | None
    """Share of those captions that it leaves out (paper, Table 2); None without `decoding`."""
    has_captioner: bool
    """Whether synthetic texts are kept."""
    has_filter: bool
    """Whether it leaves out some texts of a source that it uses."""
    seeds: tuple[int, ...]
    num_web: int
    num_synthetic: int
    num_human: int
    dropped_web: int | None
    """Web texts left out; None when it uses none of them."""
    dropped_synthetic: int | None
    figures: tuple[ComparedFigure, ...]

    @property
    def num_texts(self) -> int:
        """Texts that its models were trained on."""
        return self.num_web + self.num_synthetic + self.num_human

    def figure(self, metric: str) -> ComparedFigure | None:
        """The figure of a metric, None when it was not measured."""
        return next((each for each in self.figures if each.metric == metric), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Policies compared on one round's texts, all at the same steps and settings."""

    round: int
    steps: int
    batch_size: int
    num_images: int
    """Held-out images that all are measured on."""
    baseline: str | None
    """Name of the policy that the others are compared with; None where nothing else was."""
    has_decodings: bool
    """Whether captions of another decoding than the round's are among what is compared."""
    policies: tuple[ComparedPolicy, ...]

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics that were measured, with their labels, in order."""
        found = {each.metric for row in self.policies for each in row.figures}
        return {metric: label for metric, label in METRICS.items() if metric in found}

    @property
    def covers_seeds(self) -> bool:
        """Whether intervals tell what other seeds would do; not with one seed."""
        return any(len(row.seeds) > 1 for row in self.policies)


def compared(
    lake: Lake,
    round: int | None = None,
    *,
    steps: int | None = None,
    generations: Sequence[str] | None = None,
    seeds: Collection[int] | None = None,
) -> Comparison | None:
    """The comparison that a lake holds; None when nothing was compared.

    Without a round the latest that was compared, without steps those that most models were trained for, without
    generations or seeds all there are. Policies come in the order of `generations`, else as the paper's Table 1
    has them: without captioner and filter, with the filter, with the captioner, with both; a policy on the round's own
    captions before the same on others.
    """
    with connect(lake) as connection:
        rows = _dicts(connection.execute(_ARMS, {"round": round, "steps": steps}))
        if generations is not None:
            rows = [row for row in rows if row["generation"] in generations]
        if seeds is not None:
            rows = [row for row in rows if row["seed"] in seeds]
        if not rows:
            return None
        last = max(row["round"] for row in rows)
        rows = [row for row in rows if row["round"] == last]
        counted = [row["steps"] for row in rows]
        most = max(counted, key=lambda each: (counted.count(each), each))
        rows = [row for row in rows if row["steps"] == most]
        asked = {"round": last, "models": sorted({row["model_id"] for row in rows})}
        figures = _dicts(connection.execute(_FIGURES, asked))
        resamples = _dicts(connection.execute(_RESAMPLES, asked))
        named = {"round": last, "generations": sorted({row["generation"] for row in rows})}
        noise = {
            row["generation"]: row["ratio"] for row in _dicts(connection.execute(_NOISE, named))
        }
    rows = [row | {"noise_ratio": noise.get(row["generation"])} for row in rows]
    return _comparison(rows, figures, resamples, generations)


def _comparison(
    rows: list[dict[str, Any]],
    figures: list[dict[str, Any]],
    resamples: list[dict[str, Any]],
    generations: Sequence[str] | None,
) -> Comparison:
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["generation"], []).append(row)
    wanted = list(generations or sorted(by_policy, key=lambda name: _place(by_policy[name][0])))
    order = [name for name in wanted if name in by_policy]
    drawn = {
        (row["model_id"], row["metric"]): np.array(row["resamples"], dtype=np.float64)
        for row in resamples
    }
    known = {
        (row["model_id"], row["metric"]): SeedFigure(
            value=row["value"], resamples=drawn[row["model_id"], row["metric"]]
        )
        for row in figures
        if (row["model_id"], row["metric"]) in drawn
    }
    arms = {name: {row["seed"]: row["model_id"] for row in by_policy[name]} for name in order}
    base = next((name for name in order if by_policy[name][0]["policy"] == BASELINE), order[0])
    compared_figures: dict[str, list[ComparedFigure]] = {name: [] for name in order}
    for metric, label in METRICS.items():
        for name, figure in _figures(metric, label, arms, known, base).items():
            compared_figures[name].append(figure)
    has_decodings = any(row["decoding"] not in (None, row["own_decoding"]) for row in rows)
    policies = tuple(
        _policy(by_policy[name], compared_figures[name], has_decodings) for name in order
    )
    baseline = next(row.name for row in policies if row.generation == base)
    return Comparison(
        round=rows[0]["round"],
        steps=rows[0]["steps"],
        batch_size=json.loads(rows[0]["settings"])["train"]["batch_size"],
        num_images=max((row["n"] for row in figures if row["metric"] == "mean_recall"), default=0),
        baseline=baseline if len(policies) > 1 else None,
        has_decodings=has_decodings,
        policies=policies,
    )


def _figures(
    metric: str,
    label: str,
    arms: dict[str, dict[int, str]],
    known: dict[tuple[str, str], SeedFigure],
    base: str,
) -> dict[str, ComparedFigure]:
    """One metric of every policy that has it."""
    measured: dict[str, SeedArm] = {
        name: {
            seed: known[model_id, metric]
            for seed, model_id in models.items()
            if (model_id, metric) in known
        }
        for name, models in arms.items()
    }
    measured = {name: arm for name, arm in measured.items() if arm}
    means = dict(zip(measured, mean_estimates(list(measured.values())), strict=True))
    others = [name for name in measured if name != base]
    gains = difference_estimates([measured[name] for name in others], measured.get(base, {}))
    gain_of = dict(zip(others, gains, strict=True))
    return {
        name: ComparedFigure(
            metric=metric,
            label=label,
            mean=_within_range(means[name], metric),
            gain=gain_of.get(name),
            by_seed=tuple((seed, figure.value) for seed, figure in sorted(arm.items())),
        )
        for name, arm in measured.items()
    }


def _within_range(estimate: Estimate, metric: str) -> Estimate:
    """Without what a symmetric interval has beyond the least and the greatest value that there can be."""
    high = estimate.high if metric in UNBOUNDED else min(1.0, estimate.high)
    return replace(estimate, low=max(0.0, estimate.low), high=high)


def _policy(
    rows: list[dict[str, Any]], figures: list[ComparedFigure], has_decodings: bool
) -> ComparedPolicy:
    first = rows[0]
    label, decoding = first["label"], first["decoding"]
    return ComparedPolicy(
        policy=first["policy"],
        params=first["params"],
        label=label,
        name=f"{label} ({decoding})" if has_decodings and decoding else label,
        decoding=decoding,
        noise_ratio=first["noise_ratio"] if decoding else None,
        generation=first["generation"],
        has_captioner=bool(first["num_synthetic"]),
        has_filter=bool(first["dropped_web"] or first["dropped_synthetic"]),
        seeds=tuple(sorted(row["seed"] for row in rows)),
        num_web=first["num_web"],
        num_synthetic=first["num_synthetic"],
        num_human=first["num_human"],
        dropped_web=first["dropped_web"],
        dropped_synthetic=first["dropped_synthetic"],
        figures=tuple(figures),
    )


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of a policy in the table: the paper's four first, in its order, then others by name; the round's own captions first."""
    paper = ("raw", "web_filtered", "all", "blip")
    name, decoding = row["policy"], row["decoding"]
    is_other = decoding != row["own_decoding"]
    place = paper.index(name) if name in paper else len(paper)
    return (place, name, row["params"], is_other, decoding or "")


def _dicts(answer: Any) -> list[dict[str, Any]]:
    names = [column[0] for column in answer.description]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]
