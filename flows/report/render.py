"""Facts to HTML: one page with its style sheet, charts, pictures and a small script inside it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flows import scales
from flows.comparison.figure import STYLE
from flows.report import charts
from flows.report.audit_parts import audit_parts
from flows.report.facts import Arms, Comparison, Curve, Measured, ReportFacts
from flows.report.panel import Panel
from flows.report.pay_parts import pay_parts
from flows.report.round_facts import Watched

HERE = Path(__file__).parent

METRIC_LABELS = {
    "mean_recall": "Mean recall",
    "caption_truth": "Captions true of the picture",
    "i2t_r1": "Image to text, R@1",
    "i2t_r5": "Image to text, R@5",
    "i2t_r10": "Image to text, R@10",
    "t2i_r1": "Text to image, R@1",
    "t2i_r5": "Text to image, R@5",
    "t2i_r10": "Text to image, R@10",
    "itm_auc_random": "ITM AUC, random negatives",
    "itm_auc_hard": "ITM AUC, hard negatives",
    "itm_auc_swapped": "ITM AUC, one word swapped",
    "itm_ap_random": "ITM average precision, random negatives",
    "itm_ap_hard": "ITM average precision, hard negatives",
    "itm_ap_swapped": "ITM average precision, one word swapped",
    "cider": "CIDEr",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
}
"""Order and names of the metrics; others follow under their own names."""

LOSSES = {
    "loss_itc": ("Contrastive loss", "ITC, nats"),
    "loss_itm": ("Matching loss", "ITM, nats"),
    "loss_lm": ("Language-model loss", "LM, nats"),
}
RUNS = {
    "pretrain": "pretrain (raw texts)",
    "champion": "champion (an earlier round)",
    "retrain": "retrain (clean set)",
    "captioner": "captioner",
    "filter": "filter",
}
STAGES = (
    "ingest",
    "pretrain",
    "captioner",
    "filter",
    "caption",
    "score",
    "caption-and-score",
    "decide",
    "audit",
    "retrain",
    "evaluate",
    "gate",
    "report",
)
MAX_POINTS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One of the page's leading figures."""

    label: str
    figure: str
    note: str


def render_report(facts: ReportFacts) -> str:
    """The page as HTML text. Equal facts give equal text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        short=lambda model_id: model_id[:8] if model_id else scales.DASH,
        thousands=lambda number: f"{number:,}",
        duration=scales.duration,
        # Rounded down: a text dropped at 0.4998 must not read as 0.500.
        probability=lambda p: scales.DASH if p is None else f"{math.floor(p * 1000) / 1000:.3f}",
        third=lambda value: scales.DASH if value is None else f"{value:.3f}",
        second=lambda value: scales.DASH if value is None else f"{value:.2f}",
        metric=lambda name: METRIC_LABELS.get(name, name.replace("_", " ")),
        interval=_interval,
        run=lambda name: RUNS.get(name, name),
    )
    environment.filters["at_round"] = lambda points, round: dict(points).get(round)
    numbers = charts.numbering()
    return environment.get_template("template.html.j2").render(
        facts=facts,
        style=Markup((HERE / "style.css").read_text() + (STYLE if facts.comparison else "")),
        share=scales.share,
        headline=_headline(facts),
        tiles=_tiles(facts),
        funnel_top=max((step.rows for step in facts.funnel), default=0) or 1,
        comparisons=_comparisons(facts.arms, numbers),
        finetuned=sorted(facts.finetuned, key=lambda row: (_metric_order(row.metric), row.role)),
        loss_panels=_loss_panels(facts.curves, numbers),
        run_names=list(_runs(facts.curves)),
        histogram_panels=_histogram_panels(facts, numbers),
        stages=sorted(facts.round.seconds.items(), key=lambda item: _stage_order(item[0])),
        settings=_flat(facts.round.settings),
        script=Markup((HERE / "page.js").read_text()),
        **audit_parts(facts.audit, numbers),
        watched_rows=_watched_rows(facts, numbers),
        cost_note=_cost_note(facts),
        **pay_parts(facts.comparison),
    )


def _watched_rows(facts: ReportFacts, numbers: charts.Numbering) -> list[tuple[Watched, Markup]]:
    """The collapse monitor's figures, each with a line through the rounds once there are two."""
    rows = []
    for watched in facts.neighbours.watched:
        line = charts.Line(label=watched.label, style="run-retrain", points=watched.points)
        chart = charts.spark_line(numbers, line) if len(watched.points) > 1 else Markup("")
        rows.append((watched, chart))
    return rows


def _cost_note(facts: ReportFacts) -> str:
    """What a kept pair cost."""
    row = next((r for r in facts.neighbours.rounds if r.round == facts.round.round), None)
    if row is None or not row.seconds_per_kept or not row.kept:
        return ""
    return f"{row.seconds_per_kept:.3g} s for each of {row.kept:,} kept pairs."


def _headline(facts: ReportFacts) -> str:
    """The round in one line: what became of the first metric that both models have."""
    for metric in METRIC_LABELS:
        for row in facts.arms.rows if facts.arms else ():
            if row.metric == metric and row.before and row.after:
                before, after = row.before.value, row.after.value
                turn = "rose" if after > before else "fell" if after < before else "stayed"
                return f"{METRIC_LABELS[metric]} {turn} from {before:.3f} to {after:.3f}"
    return f"Round {facts.round.round}"


def _tiles(facts: ReportFacts) -> list[Tile]:
    tiles: list[Tile] = []
    rows = facts.arms.rows if facts.arms else ()
    for metric in ("mean_recall", "caption_truth", "cider"):
        row = next((row for row in rows if row.metric == metric and row.after), None)
        if row is None or row.after is None or len(tiles) == 2:
            continue
        note = "no earlier model" if row.before is None else f"from {row.before.value:.3f}"
        tiles.append(Tile(label=METRIC_LABELS[metric], figure=f"{row.after.value:.3f}", note=note))
    if facts.funnel:
        kept, proposed = facts.funnel[-1].rows, facts.funnel[-2].rows
        note = f"{kept:,} of {proposed:,} scored"
        tiles.append(Tile(label="Texts kept", figure=scales.share(kept, proposed), note=note))
    if facts.round.seconds:
        slowest = max(facts.round.seconds, key=lambda stage: facts.round.seconds[stage])
        total = scales.duration(sum(facts.round.seconds.values()))
        tiles.append(Tile(label="Time of all stages", figure=total, note=f"most: {slowest}"))
    return tiles


def _comparisons(
    arms: Arms | None, numbers: charts.Numbering
) -> list[tuple[Comparison, str, str, Markup]]:
    """Rows of the before/after table: the metric, its gain, the gain's style, its little chart."""
    if arms is None:
        return []
    rows = []
    for row in sorted(arms.rows, key=lambda row: _metric_order(row.metric)):
        gain, style = scales.DASH, ""
        if row.before and row.after:
            difference = row.after.value - row.before.value
            gain = f"{difference:+.3f}"
            style = "up" if difference > 0 else "down" if difference < 0 else ""
        title = METRIC_LABELS.get(row.metric, row.metric)
        rows.append((row, gain, style, charts.range_chart(numbers, title, row.before, row.after)))
    return rows


def _interval(measured: Measured | None) -> Markup:
    """The 95 % interval in small print; nothing where there is none."""
    if measured is None or measured.low is None or measured.high is None:
        return Markup("")
    return Markup("<small>{:.3f} to {:.3f}</small>").format(measured.low, measured.high)


def _metric_order(metric: str) -> tuple[int, str]:
    order = list(METRIC_LABELS)
    return (order.index(metric) if metric in order else len(order), metric)


def _runs(curves: tuple[Curve, ...]) -> list[str]:
    present = {curve.run for curve in curves}
    return [run for run in RUNS if run in present] + sorted(present - set(RUNS))


def _loss_panels(curves: tuple[Curve, ...], numbers: charts.Numbering) -> list[Panel]:
    panels = []
    for metric, (title, y_label) in LOSSES.items():
        lines = [
            charts.Line(label=RUNS.get(run, run), style=f"run-{run}", points=_thin(curve.points))
            for run in _runs(curves)
            for curve in curves
            if curve.run == run and curve.metric == metric and curve.points
        ]
        if lines:
            svg = charts.line_chart(numbers, title, lines, x_label="step", y_label=y_label)
            panels.append(Panel(title=title, note="", svg=svg))
    return panels


def _thin(points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means over equal runs of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _histogram_panels(facts: ReportFacts, numbers: charts.Numbering) -> list[Panel]:
    panels = []
    for histogram in facts.histograms:
        kept, total = sum(histogram.kept), sum(histogram.kept) + sum(histogram.dropped)
        title = {"web": "Web texts", "synthetic": "Synthetic captions"}[histogram.source]
        svg = charts.histogram_chart(numbers, title, histogram, facts.threshold)
        note = f"{kept:,} of {total:,} kept ({scales.share(kept, total)})"
        panels.append(Panel(title=title, note=note, svg=svg))
    return panels


def _stage_order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) in their order."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows
