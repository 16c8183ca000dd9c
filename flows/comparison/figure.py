"""The comparison as a picture: one panel a metric, one line a policy, with its seeds and its 95 % interval.

SVG that stands alone: it names its own fonts and colours, for light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import count

from flows.comparison.table import ComparedFigure, ComparedPolicy, Comparison
from flows.comparison.words import notes, sentences
from flows.scales import nice_ticks, tick_label

PANEL_WIDTH = 360
LEFT, RIGHT, TOP = 128, 16, 40
ROW_HEIGHT = 26
AXIS_HEIGHT = 26
GAP = 20
COLUMNS = 2
MAX_LABEL = 20

CLASS = "did-it-pay"
"""Of every SVG element here, so that its styles touch nothing else on a page."""

_RULES = {
    ".page": "fill:#fff",
    ".title": "font-size:15px;font-weight:600;fill:#1b1b1b",
    ".name": "font-weight:600;fill:#1b1b1b",
    ".tick": "fill:#444",
    ".label": "fill:#444",
    ".note": "fill:#444",
    ".grid": "stroke:#e3e3e3",
    ".base": "fill:#777;fill-opacity:.16",
    ".base-line": "stroke:#777;stroke-dasharray:3 3",
    ".whisker": "stroke-width:2.5;stroke-linecap:round",
    ".seed": "fill-opacity:.35",
    ".noise": "stroke:#555;fill:#555",
    ".better": "stroke:#0f766e;fill:#0f766e",
    ".worse": "stroke:#b42318;fill:#b42318",
    ".mean": "stroke:#fff;stroke-width:1.2",
}
_IN_THE_DARK = {
    ".page": "fill:#17191c",
    ".title": "fill:#f2f2f2",
    ".name": "fill:#f2f2f2",
    ".tick": "fill:#c4c4c4",
    ".label": "fill:#c4c4c4",
    ".note": "fill:#c4c4c4",
    ".grid": "stroke:#34383d",
    ".base": "fill:#aaa",
    ".base-line": "stroke:#aaa",
    ".noise": "stroke:#bbb;fill:#bbb",
    ".better": "stroke:#4fd1c0;fill:#4fd1c0",
    ".worse": "stroke:#ff8b7e;fill:#ff8b7e",
    ".mean": "stroke:#17191c",
}


def _scoped(rules: Mapping[str, str]) -> str:
    return "".join(f".{CLASS} {name}{{{rule}}}" for name, rule in rules.items())


STYLE = (
    f".{CLASS}{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:12px}}"
    f"{_scoped(_RULES)}@media (prefers-color-scheme:dark){{{_scoped(_IN_THE_DARK)}}}"
)
"""Better and worse also differ by words in every mark's title and in the label beside it."""


def figure_svg(comparison: Comparison) -> str:
    """The whole figure; equal comparisons give equal text."""
    metrics = comparison.metrics
    panels = [panel(comparison, metric) for metric in metrics]
    height = panel_height(comparison)
    lines = -(-len(panels) // COLUMNS)
    width = COLUMNS * PANEL_WIDTH + (COLUMNS + 1) * GAP
    about = _folded(_subtitle(comparison))
    top = 38 + 18 * len(about)
    said = [line for text in [*sentences(comparison), *notes(comparison)] for line in _folded(text)]
    total = top + lines * (height + GAP) + 18 * len(said) + GAP
    title = f"Round {comparison.round}: did it pay?"
    parts = [
        f'<rect class="page" width="{width}" height="{total}"/>',
        f'<text class="title" x="{GAP}" y="26">{escape(title)}</text>',
        *_lines(about, 44),
    ]
    for number, drawn in enumerate(panels):
        x = GAP + (number % COLUMNS) * (PANEL_WIDTH + GAP)
        y = top + (number // COLUMNS) * (height + GAP)
        parts.append(f'<g transform="translate({x} {y})">{drawn}</g>')
    below = top + lines * (height + GAP) + 8
    parts += _lines(said, below)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{CLASS}" viewBox="0 0 {width} {total}" '
        f'width="{width}" height="{total}" role="img" aria-labelledby="{CLASS}-t {CLASS}-d">'
        f'<title id="{CLASS}-t">{escape(title)}</title><desc id="{CLASS}-d">'
        f"{escape(' '.join([_subtitle(comparison), *sentences(comparison)]))}</desc>"
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def panel_svg(comparison: Comparison, metric: str) -> str:
    """One metric as an SVG element for a page that has STYLE; `PANEL_WIDTH` px wide, so that a phone shows it 1:1."""
    height, label = panel_height(comparison), escape(comparison.metrics[metric])
    return (
        f'<svg class="{CLASS}" viewBox="0 0 {PANEL_WIDTH} {height}" role="img" aria-label="{label}">'
        f"{panel(comparison, metric)}</svg>"
    )


def panel(comparison: Comparison, metric: str) -> str:
    """One metric as the content of an SVG element, `PANEL_WIDTH` by `panel_height` px."""
    rows = [(row, figure) for row in comparison.policies if (figure := row.figure(metric))]
    ends = [
        100 * value
        for _, figure in rows
        for value in (figure.mean.low, figure.mean.high, *(v for _, v in figure.by_seed))
    ]
    # A hair's breadth is not blown up to the width of the panel.
    ticks = nice_ticks(min(ends), max(max(ends), min(ends) + 1), 4)
    span = ticks[-1] - ticks[0]

    def x(value: float) -> float:
        return LEFT + (PANEL_WIDTH - LEFT - RIGHT) * (100 * value - ticks[0]) / span

    bottom = TOP + ROW_HEIGHT * len(rows)
    parts = [f'<text class="name" x="0" y="16">{escape(comparison.metrics[metric])}</text>']
    for tick in ticks:
        at = f"{x(tick / 100):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP - 8}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{bottom + 16}" text-anchor="middle">{tick_label(tick)}</text>'
        )
    for row, figure in rows:
        if row.name == comparison.baseline:
            left, right = x(figure.mean.low), x(figure.mean.high)
            mean = f"{x(figure.mean.value):.1f}"
            parts.append(
                f'<rect class="base" x="{left:.1f}" y="{TOP - 8}" width="{right - left:.1f}" '
                f'height="{bottom - TOP + 8}"/><line class="base-line" x1="{mean}" x2="{mean}" '
                f'y1="{TOP - 8}" y2="{bottom}"/>'
            )
    for number, (row, figure) in enumerate(rows):
        y = TOP + ROW_HEIGHT * number + ROW_HEIGHT / 2 - 4
        places = {
            "low": x(figure.mean.low),
            "high": x(figure.mean.high),
            "value": x(figure.mean.value),
        }
        seeds = [x(value) for _, value in figure.by_seed]
        parts.append(_mark(row, figure, places, seeds, y))
    return "".join(parts)


def panel_height(comparison: Comparison) -> int:
    """Height of every panel in px."""
    return TOP + ROW_HEIGHT * len(comparison.policies) + AXIS_HEIGHT


def _mark(
    row: ComparedPolicy,
    figure: ComparedFigure,
    places: dict[str, float],
    seeds: list[float],
    y: float,
) -> str:
    style, words = _judged(figure)
    mean = figure.mean
    said = (
        f"{row.name}: {100 * mean.value:.1f}, {100 * mean.low:.1f} to {100 * mean.high:.1f}{words}"
    )
    dots = "".join(f'<circle class="seed {style}" cx="{s:.1f}" cy="{y}" r="2.6"/>' for s in seeds)
    return (
        f'<g><title>{escape(said)}</title><text class="label" x="0" y="{y + 4}">'
        f"{escape(_short(row))}</text>"
        f'<line class="whisker {style}" x1="{places["low"]:.1f}" x2="{places["high"]:.1f}" y1="{y}" '
        f'y2="{y}"/>{dots}<circle class="mean {style}" cx="{places["value"]:.1f}" cy="{y}" r="5"/></g>'
    )


def _judged(figure: ComparedFigure) -> tuple[str, str]:
    """Style and words of a figure beside the baseline's."""
    gain = figure.gain
    if gain is None:
        return "noise", ""
    change = f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    if not gain.is_clear:
        return "noise", f"; within noise of the baseline: {change}"
    style = "better" if gain.value > 0 else "worse"
    return style, f"; {style} than the baseline: {change}"


def _subtitle(comparison: Comparison) -> str:
    seeds = max(len(row.seeds) for row in comparison.policies)
    return (
        f"{comparison.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}; dot: mean, small dots: seeds, bar: 95 % "
        f"interval; figures x 100; green: clearly better than {comparison.baseline or 'the baseline'}, red: clearly worse"
    )


def _lines(lines: Sequence[str], top: int) -> list[str]:
    return [
        f'<text class="note" x="{GAP}" y="{y}">{escape(line)}</text>'
        for line, y in zip(lines, count(top, 18), strict=False)
    ]


def _short(row: ComparedPolicy) -> str:
    """The row's name, no longer than there is room for; of a long one the decoding at its end stays."""
    if len(row.name) <= MAX_LABEL:
        return row.name
    end = row.name.removeprefix(row.label)
    return f"{row.label[: MAX_LABEL - len(end) - 1]}…{end}"


def _folded(text: str, width: int = 118) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
