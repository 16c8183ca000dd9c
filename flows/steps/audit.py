"""The audit of a round: what canaries and judge say of its filter, and how much noise its clean set still holds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from blip_core import Metric
from blip_core.filter_figures import filter_metrics, kept_rate
from blip_core.noise import NoiseModel, rate_draws, score_ranges, share_of_draws
from blip_core.rates import Rate
from flows import models
from flows.audit.planting import WRITTEN
from flows.session import Run
from flows.steps.batches import rows_table
from storage import Clock, PartRef, basis_of, commit_part, committed_part, connect, list_parts
from storage.generations import active_generation

STAGE_VERSION = 1
PART = "audit"
CANARIES, JUDGE = "canaries", "judge"
DEFAULT_CUT = 0.5
LEAST_OF_A_STRATUM = 10

_RANGES = """
SELECT source, len(list_filter($edges::DOUBLE[], lambda e: e <= {number})) AS range,
       count(*) AS texts, count(*) FILTER (WHERE kept) AS kept
FROM verdicts WHERE round = $round AND {number} IS NOT NULL
GROUP BY ALL
"""
_JUDGED = """
SELECT j.source, v.kept, v.itm_prob, coalesce(j.itm_prob, j.itc_sim), j.itm_prob
FROM judgements j JOIN verdicts v USING (caption_id, round)
WHERE j.round = ? AND coalesce(j.itm_prob, j.itc_sim) IS NOT NULL
ORDER BY j.caption_id
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryScores:
    """The scores of a round's canaries."""

    number: str
    """itm_prob, or itc_sim of a scorer without the other."""
    of_kind: Mapping[str, np.ndarray]
    of_stratum: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Scores of true texts and of mismatches."""
    written: np.ndarray
    """Scores of what the captioner wrote for canary images."""
    is_contradicted: np.ndarray
    """Whether what it wrote is contradicted by all who captioned the image."""
    people_contradicted: Rate
    """Human captions that the others of their image contradict: what the sign says of true texts."""

    def wrong_written(self, cut: float = -np.inf) -> Rate:
        """Contradicted captions among those written that have a score of `cut` or more."""
        kept = self.written >= cut
        return Rate(hits=int(self.is_contradicted[kept].sum()), n=int(kept.sum()))

    def written_draws(self, rate: Rate) -> np.ndarray:
        """Draws (R,) of the share of wrong captions among written ones, of which so many are contradicted."""
        floor = self.people_contradicted.value if self.people_contradicted.n else 0.0
        return rate_draws(rate.hits, rate.n, floor=floor)


def audit_round(run: Run) -> PartRef:
    """Measure the round's filter by its canaries and its judge, or find it measured; one part of `metrics`."""
    active = active_generation(run.lake, run.round)
    parts = [
        ref.fingerprint
        for table in ("canaries", "judgements", "scores", "decisions")
        for ref in list_parts(run.lake, table, run.round)
        if table != "decisions" or active is None or ref.name == active.generation
    ]
    config: dict[str, Any] = {"precision": run.settings.audit.precision}
    with connect(run.lake, as_of=run.round) as con:
        config["policy"] = list(active_policy(con, run.round))
        scorer = models.scorer_ref(run)
        basis = basis_of("audit", STAGE_VERSION, config, sorted(parts), scorer.model_id)
        known = committed_part(
            run.lake, "metrics", PART, round=run.round, basis=basis, on_stale="rebuild"
        )
        if known is not None:
            return known
        clock = Clock()
        measured = [(CANARIES, metric) for metric in _by_canaries(con, run)]
        measured += [(JUDGE, metric) for metric in _by_judge(con, run.round)]
    records = [
        {
            "round": run.round,
            "model_id": scorer.model_id,
            "dataset": dataset,
            "metric": metric.name,
            "value": metric.value,
            "low": metric.low,
            "high": metric.high,
            "n": metric.n,
            "protocol": None,
        }
        for dataset, metric in measured
    ]
    table = rows_table("metrics", records)
    return commit_part(run.lake, "metrics", PART, table, round=run.round, basis=basis, clock=clock)


def active_policy(con: Any, round: int) -> tuple[str, str]:
    """The policy and the parameters of a round's active decisions."""
    row = con.execute(
        "SELECT any_value(policy), any_value(params) FROM active_decisions WHERE round = ?",
        [round],
    ).fetchone()
    return (str(row[0]), str(row[1])) if row and row[0] else ("", "{}")


def canary_scores(con: Any, round: int) -> CanaryScores | None:
    """The scores of a round's canaries; None when it has none."""
    rows = con.execute(
        "SELECT kind, truth, stratum, itm_prob, itc_sim, contradicted FROM canaries WHERE round = ? "
        "ORDER BY caption_id, kind",
        [round],
    ).fetchall()
    if not rows:
        return None
    asked = [bool(row[5]) for row in rows if row[0] == "true" and row[5] is not None]
    number, place = ("itm_prob", 3) if rows[0][3] is not None else ("itc_sim", 4)
    of_kind: dict[str, list[float]] = defaultdict(list)
    of_stratum: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    written: list[tuple[float, bool]] = []
    for row in rows:
        if row[place] is None or not np.isfinite(row[place]):
            continue
        if row[0] == WRITTEN:
            if row[5] is not None:
                written.append((row[place], row[5]))
            continue
        of_kind[row[0]].append(row[place])
        of_stratum[row[2]][0 if row[1] else 1].append(row[place])
    return CanaryScores(
        number=number,
        of_kind={kind: np.array(scores) for kind, scores in of_kind.items()},
        of_stratum={name: (np.array(a), np.array(b)) for name, (a, b) in of_stratum.items()},
        written=np.array([score for score, _ in written]),
        is_contradicted=np.array([wrong for _, wrong in written], dtype=bool),
        people_contradicted=Rate(hits=sum(asked), n=len(asked)),
    )


def cut_of(con: Any, round: int, number: str) -> float:
    """The score from which the round's policy keeps a text.

    Its own threshold where it has one; else where kept and dropped web texts part; 0.5 where they overlap.
    """
    threshold = json.loads(active_policy(con, round)[1]).get("threshold")
    if threshold is not None:
        return float(threshold)
    lowest, highest = con.execute(
        f"SELECT min({number}) FILTER (WHERE kept), max({number}) FILTER (WHERE NOT kept) "
        "FROM verdicts WHERE round = ? AND source = 'web'",
        [round],
    ).fetchone()
    if lowest is not None and (highest is None or lowest >= highest):
        return float(lowest)
    return DEFAULT_CUT


def noise_model(scores: CanaryScores, cut: float) -> NoiseModel:
    """The mixture that a round's canaries stand for."""
    return NoiseModel(
        scores.of_kind, score_ranges(np.concatenate(list(scores.of_kind.values())), [cut])
    )


def range_counts(
    con: Any, round: int, number: str, edges: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By source, how many texts and how many kept ones lie in each range of scores."""
    counts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    found = con.execute(_RANGES.format(number=number), {"round": round, "edges": edges.tolist()})
    for source, place, texts, kept in found.fetchall():
        size = len(edges) + 1
        of_source = counts.setdefault(source, (np.zeros(size, int), np.zeros(size, int)))
        of_source[0][place], of_source[1][place] = texts, kept
    return dict(sorted(counts.items()))


def _by_canaries(con: Any, run: Run) -> Iterator[Metric]:
    scores = canary_scores(con, run.round)
    if scores is None:
        return
    cut = cut_of(con, run.round, scores.number)
    yield Metric("threshold", cut, 0)
    yield from filter_metrics(scores.of_kind, cut)
    for stratum, (true, wrong) in sorted(scores.of_stratum.items()):
        if min(len(true), len(wrong)) >= LEAST_OF_A_STRATUM:
            for name, values in ((f"recall_{stratum}", true), (f"false_keep_{stratum}", wrong)):
                rate = kept_rate(values, cut)
                yield Metric(f"filter_{name}", rate.value, rate.n, *rate.interval())
    model = noise_model(scores, cut)
    groups = range_counts(con, run.round, scores.number, model.edges)
    if len(scores.written):
        for name, rate in (
            ("written_contradicted", scores.wrong_written()),
            ("written_contradicted_kept", scores.wrong_written(cut)),
            ("people_contradicted", scores.people_contradicted),
        ):
            if rate.n:
                yield Metric(name, rate.value, rate.n, *rate.interval())
    yield from _noise(scores, cut, model, groups)
    if "web" in groups:
        reached = _threshold_for(model, groups["web"][0], run.settings.audit.precision)
        if reached is not None:
            yield Metric("threshold_for_precision_web", reached, int(groups["web"][0].sum()))


def noise_draws(
    scores: CanaryScores,
    source: str,
    model: NoiseModel,
    texts: np.ndarray,
    kept: np.ndarray,
    cut: float,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws (R,) of the share of wrong texts of a source among all and among the kept.

    Of web texts by the mixture of scores. Of synthetic captions that is too little: a captioner's errors are of the kind
    that its sister, the filter, does not see either. What people say of its captions for canary images is too much: it
    knows the images of the web better, having been pretrained on them. Which of the two is nearer nobody can tell from
    here, so each gives half of the draws, and the interval reaches over both.
    """
    noise = model.noise_of_ranges(texts)
    before = noise @ (texts / texts.sum())
    left = noise @ (kept / kept.sum()) if kept.sum() else None
    if source != "synthetic" or not len(scores.written):
        return before, left
    found, found_left = scores.wrong_written(), scores.wrong_written(cut)
    before = half_of_each(before, scores.written_draws(found))
    if left is not None and found_left.n:
        left = half_of_each(left, scores.written_draws(found_left))
    return before, left


def half_of_each(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Draws (R,) of two models that are equally likely to be right."""
    takes_one = np.random.default_rng(0).permutation(len(one)) < len(one) // 2
    mixed: np.ndarray = np.where(takes_one, one, other)
    return mixed


def _noise(
    scores: CanaryScores,
    cut: float,
    model: NoiseModel,
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Iterator[Metric]:
    """`noise_before` and `noise_left` by source and together."""
    drawn: dict[str, list[tuple[np.ndarray, int]]] = {"before": [], "left": []}
    for source, (texts, kept) in groups.items():
        both = noise_draws(scores, source, model, texts, kept, cut)
        for when, draws, n in zip(drawn, both, (texts.sum(), kept.sum()), strict=True):
            if draws is not None:
                drawn[when].append((draws, int(n)))
                yield _share_metric(f"noise_{when}_{source}", draws, int(n))
    for when, parts in drawn.items():
        total = sum(n for _, n in parts)
        if total:
            together = np.sum([draws * (n / total) for draws, n in parts], axis=0)
            yield _share_metric(f"noise_{when}", together, total)


def _share_metric(name: str, draws: np.ndarray, n: int) -> Metric:
    share = share_of_draws(draws, n)
    return Metric(name, share.value, n, share.low, share.high)


def _threshold_for(model: NoiseModel, texts: np.ndarray, precision: float) -> float | None:
    """The lowest edge of a range from which on the texts are true often enough; None when none is."""
    noise = model.noise_of_ranges(texts)
    for place, edge in enumerate(model.edges):
        above = np.where(np.arange(len(texts)) > place, texts, 0)
        if above.sum() and np.median(noise @ (above / above.sum())) <= 1 - precision:
            return float(edge)
    return None


def _by_judge(con: Any, round: int) -> Iterator[Metric]:
    """How the judge sees the sample: `judge_agreement` is the share of texts on which both say the same, the judge
    keeping as many texts of each source as the policy does.
    """
    rows = con.execute(_JUDGED, [round]).fetchall()
    agreed, total = 0, 0
    for source in sorted({row[0] for row in rows}):
        of_source = [row for row in rows if row[0] == source]
        kept = np.array([row[1] for row in of_source], dtype=bool)
        judged = np.array([row[3] for row in of_source], dtype=np.float64)
        order = np.argsort(-judged, kind="stable")
        by_judge = np.zeros(len(kept), dtype=bool)
        by_judge[order[: kept.sum()]] = True
        agreed, total = agreed + int((by_judge == kept).sum()), total + len(kept)
        yield _mean(f"judge_{source}", judged)
        if kept.any():
            yield _mean(f"judge_kept_{source}", judged[kept])
    both = [(row[2], row[4]) for row in rows if row[1] and None not in (row[2], row[4])]
    if both:
        yield _mean("judge_kept_itm_prob", np.array([judge for _, judge in both]))
        yield _mean("judge_gap", np.array([own - judge for own, judge in both]))
    if total:
        hits = np.arange(total) < agreed
        yield _mean("judge_agreement", hits.astype(np.float64))


def _mean(name: str, values: np.ndarray) -> Metric:
    """A mean with its 95 % interval by the normal approximation."""
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    value = float(values.mean())
    low, high = (None, None) if half is None else (value - half, value + half)
    return Metric(name, value, len(values), low, high)
