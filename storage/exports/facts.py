"""What a card says of an export: numbers of the lake as its round left it, and of what was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storage import catalog
from storage.exports.format import Plan
from storage.exports.selection import Selection
from storage.exports.target import File, PieceRecord, Target
from storage.generations import active_generation
from storage.lake import Lake
from storage.parts_sql import rows_of
from storage.tables import PartRef, part_manifest

HELDOUT = ("mean_recall", "i2t_r1", "t2i_r1", "itm_auc_random", "itm_auc_hard", "cider", "bleu4")
"""Figures of the held-out set that a card shows; the lake has all."""

FUNNEL = """
SELECT stage, outcome, rows FROM funnel WHERE round = $round AND step <= 3 ORDER BY step, rows DESC, outcome
"""
DECIDED = """
SELECT source, count(*) FILTER (WHERE kept) AS kept, count(*) FILTER (WHERE NOT kept) AS dropped
FROM ({rows}) GROUP BY source ORDER BY source
"""
MODELS = """
WITH used AS (
    SELECT DISTINCT model_id, 'captioner' AS did FROM captions
    WHERE round = $round AND source = 'synthetic' AND model_id IS NOT NULL
    UNION
    SELECT DISTINCT model_id, 'filter' AS did FROM scores WHERE round = $round AND status = 'ok'
)
SELECT u.did, u.model_id, any_value(m.path), any_value(m.parent_id), any_value(m.trained_on)
FROM used u LEFT JOIN model_records m USING (model_id)
GROUP BY u.did, u.model_id ORDER BY u.did, u.model_id
"""
METRICS = """
SELECT x.dataset, x.metric, x.value, x.low, x.high, x.n, x.model_id, any_value(m.role), x.protocol
FROM metrics x LEFT JOIN model_records m ON m.model_id = x.model_id
WHERE x.round = $round AND NOT starts_with(x.dataset, 'train-')
GROUP BY ALL ORDER BY x.dataset, x.metric, x.model_id, x.protocol
"""
FETCHED = """
SELECT min(fetched_at)::DATE::VARCHAR, max(fetched_at)::DATE::VARCHAR
FROM pairs WHERE pool = 'web' AND status = 'ok'
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number that the round measured."""

    dataset: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int | None
    model_id: str
    role: str | None
    protocol: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that is told of an export."""

    title: str
    format: str
    plan: Plan
    config: dict[str, Any]
    """Of the export's basis: policy, generation, params, round, options."""
    files: Sequence[File]
    num_images: int
    num_texts: int
    num_lost: int
    by_source: Sequence[tuple[str | None, int, int]]
    by_licence: Sequence[tuple[str | None, int, int]]
    by_source_name: Sequence[tuple[str | None, int, int]]
    funnel: Sequence[tuple[str, str, int]]
    decided: Sequence[tuple[str, int, int]]
    """(source, kept, dropped)."""
    models: Sequence[tuple[str, str, str | None, str | None, str | None]]
    """(what it did, model id, path, parent id, training set)."""
    metrics: Sequence[Metric]
    active: str | None
    """The decision that counts in the round, by which the round's own figures were measured."""
    decided_on: str
    """Date of the decision."""
    fetched: tuple[str | None, str | None]
    """First and last day on which its web images were fetched."""


def gather(
    lake: Lake,
    part: PartRef,
    target: Target,
    plan: Plan,
    selection: Selection,
    pieces: Sequence[PieceRecord],
    files: Sequence[File],
) -> Facts:
    """Ask the lake as the round left it, and the export for what it holds."""
    config = target.basis["config"]
    round = int(config["round"])
    active = active_generation(lake, round)
    with catalog.connect(lake, as_of=round) as con:
        given = {"round": round}
        rows = rows_of(lake, "decisions", [part])
        return Facts(
            title=config["name"] or f"{config['policy']}-round-{round}",
            format=config["format"],
            plan=plan,
            config=config,
            files=files,
            num_images=sum(piece.num_images for piece in pieces),
            num_texts=sum(piece.num_texts for piece in pieces),
            num_lost=sum(len(piece.lost) for piece in pieces),
            by_source=selection.counted("source"),
            by_licence=selection.counted("licence"),
            by_source_name=selection.counted("source_name"),
            funnel=con.execute(FUNNEL, given).fetchall(),
            decided=con.execute(DECIDED.format(rows=rows)).fetchall(),
            models=con.execute(MODELS, given).fetchall(),
            metrics=[
                Metric(**dict(zip(Metric.__slots__, row, strict=True)))
                for row in con.execute(METRICS, given).fetchall()
            ],
            active=active.generation if active else None,
            decided_on=part_manifest(lake, part).started_at[:10],
            fetched=con.execute(FETCHED).fetchall()[0],
        )
