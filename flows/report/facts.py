"""What the page says, as plain values: gathered by SQL in one file, drawn as HTML in another."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from flows.comparison.table import Comparison as Compared
from flows.report.audit_facts import AuditFacts
from flows.report.round_facts import Neighbours


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundFacts:
    """The round's own record."""

    round: int
    status: str
    why: str
    champion_before: str | None
    champion_after: str | None
    started_at: datetime | None
    finished_at: datetime | None
    seconds: Mapping[str, float]
    """Wall seconds by stage."""
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCount:
    """Rows of one source (web, synthetic)."""

    source: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Rows that left the funnel at a step, and why."""

    reason: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FunnelStep:
    """Rows that reached a step; `losses` are those that did not go on to it."""

    label: str
    unit: str
    counts: tuple[SourceCount, ...]
    losses: tuple[Loss, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return sum(count.rows for count in self.counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseRow:
    """Web texts of one source_name."""

    source_name: str
    texts: int
    dropped: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One loss of one training run."""

    run: str
    metric: str
    points: tuple[tuple[float, float], ...]
    """(step, value)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A metric of one model with its 95 % interval, where there is one."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One metric before and after."""

    metric: str
    before: Measured | None
    after: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuned:
    """One metric of the round's captioner or filter."""

    metric: str
    role: str
    figure: Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """The two models compared, and on what."""

    before_label: str
    before_id: str
    after_label: str
    after_id: str
    dataset: str
    rows: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """itm_prob of one source in equal bins from 0 to 1."""

    source: str
    kept: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """One text of a gallery picture."""

    source: str
    caption: str
    itm_prob: float | None
    itc_sim: float | None
    kept: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One picture of the gallery with all its texts, the one it was chosen for first."""

    image_id: str
    source_name: str
    thumbnail: str
    """data: URI; empty when the picture cannot be read."""
    texts: tuple[TextFacts, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryGroup:
    """Cards chosen by one rule."""

    key: str
    title: str
    note: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """One model of the round, or an ancestor of one."""

    model_id: str
    role: str
    parent_id: str | None
    round: int
    trained_on: str | None
    made: str
    """What it was made for: pretrain, captioner, filter or retrain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFacts:
    """Everything on the page."""

    lake: str
    round: RoundFacts
    policy: str
    threshold: float | None
    funnel: tuple[FunnelStep, ...]
    noise: tuple[NoiseRow, ...]
    arms: Arms | None
    finetuned: tuple[Finetuned, ...]
    """Empty unless the settings ask for it (`evaluate.finetuned`)."""
    curves: tuple[Curve, ...]
    histograms: tuple[Histogram, ...]
    gallery: tuple[GalleryGroup, ...]
    models: tuple[ModelFacts, ...]
    audit: AuditFacts
    neighbours: Neighbours
    comparison: Compared | None = None
    """Policies compared on the round's texts, where `bootstrap compare` has run."""
