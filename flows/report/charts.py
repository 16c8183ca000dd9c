"""Charts as inline SVG: one small panel each, about 340 px wide, so that a phone shows them 1:1.

Colours are CSS classes of the page's style sheet, so that dark mode needs no second drawing. Every chart
has a title and a description for screen readers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from markupsafe import Markup, escape

from flows.report.facts import Histogram, Measured
from flows.scales import nice_ticks, tick_label

WIDTH, HEIGHT = 340, 212
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 28, 38


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a line chart; `style` is its CSS class."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


class Numbering(Protocol):
    """Gives each chart of a page an id of its own."""

    def __next__(self) -> int: ...


def numbering() -> Numbering:
    """A fresh numbering for one page."""
    return count(1)


def line_chart(
    numbers: Numbering, title: str, lines: Sequence[Line], *, x_label: str, y_label: str
) -> Markup:
    """Lines over a shared x axis that starts at 0."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks = nice_ticks(0, max(xs), 4)
    y_ticks = nice_ticks(min(ys), max(ys), 4)
    frame = Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = grid(frame, y_ticks, x_ticks, x_label, y_label)
    for line in lines:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline class="line {line.style}" points="{path}">'
            f"<title>{escape(line.label)}</title></polyline>"
        )
        if len(line.points) == 1:
            x, y = line.points[0]
            circle = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2"'
            parts.append(f'<circle class="line {line.style}" {circle}/>')
    ends = "; ".join(
        f"{line.label}: {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines
    )
    return svg(numbers, title, f"{y_label} over {x_label}. {ends}.", parts)


def histogram_chart(
    numbers: Numbering, title: str, histogram: Histogram, threshold: float | None
) -> Markup:
    """Texts by itm_prob, kept and dropped, on a logarithmic count axis.

    The filter is sure of most texts; on a linear axis the borderline ones could not be seen.
    """
    totals = [k + d for k, d in zip(histogram.kept, histogram.dropped, strict=True)]
    decades = max(1, math.ceil(math.log10(max([*totals, 2]))))
    frame = Frame(0.0, 1.0, -0.3, float(decades))
    parts = grid(
        frame,
        [float(k) for k in range(decades + 1)],
        [0, 0.25, 0.5, 0.75, 1],
        "itm_prob",
        "texts (log scale)",
        y_names=[tick_label(10**k) for k in range(decades + 1)],
    )
    width = 1 / len(totals)
    for i, total in enumerate(totals):
        if not total:
            continue
        style = f"bar-{histogram.source}" if histogram.kept[i] * 2 >= total else "bar-dropped"
        top = frame.y(math.log10(total))
        parts.append(
            f'<rect class="{style}" x="{frame.x(i * width) + 0.75:.1f}" y="{top:.1f}" '
            f'width="{frame.x(width) - frame.x(0) - 1.5:.1f}" '
            f'height="{frame.y(-0.3) - top:.1f}"><title>{i * width:.2f} to {(i + 1) * width:.2f}: '
            f"{histogram.kept[i]:,} kept, {histogram.dropped[i]:,} dropped</title></rect>"
        )
    if threshold is not None:
        x = frame.x(threshold)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{frame.y(-0.3)}"/>')
        anchor, shift = ("start", 5) if threshold < 0.7 else ("end", -5)
        parts.append(
            f'<text class="mark-label" x="{x + shift:.1f}" y="22" text-anchor="{anchor}">'
            f"kept from {threshold:g}</text>"
        )
    kept, dropped = sum(histogram.kept), sum(histogram.dropped)
    return svg(numbers, title, f"{kept:,} kept and {dropped:,} dropped, by itm_prob.", parts)


def range_chart(
    numbers: Numbering, title: str, before: Measured | None, after: Measured | None
) -> Markup:
    """One metric of two models on a 0 to 1 track (or to its own maximum), with 95 % intervals."""
    known = [m for m in (before, after) if m is not None]
    top = max([1.0, *(m.high or m.value for m in known)])
    width, height = 180, 26
    parts = [f'<line class="track" x1="6" x2="{width - 6}" y1="13" y2="13"/>']

    def x(value: float) -> float:
        return 6 + (width - 12) * max(0.0, min(value, top)) / top

    for measured, style in ((before, "before"), (after, "after")):
        if measured is None:
            continue
        if measured.low is not None and measured.high is not None:
            parts.append(
                f'<line class="whisker {style}" x1="{x(measured.low):.1f}" '
                f'x2="{x(measured.high):.1f}" y1="13" y2="13"/>'
            )
        parts.append(f'<circle class="dot {style}" cx="{x(measured.value):.1f}" cy="13" r="4"/>')
    said = " to ".join(f"{m.value:.3f}" for m in known)
    return svg(numbers, title, f"From {said}, on a scale from 0 to {top:g}.", parts, width, height)


def spark_line(numbers: Numbering, line: Line) -> Markup:
    """A line through a few points without axes, beside its numbers."""
    width, height = 180, 26
    xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
    span, rise = (max(values) - min(values) or 1.0 for values in (xs, ys))
    places = [
        (6 + (width - 12) * (x - min(xs)) / span, height - 6 - (height - 12) * (y - min(ys)) / rise)
        for x, y in line.points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line {line.style}" points="{path}"/>']
    parts += [f'<circle class="dot after" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    said = ", ".join(f"{y:.3g}" for y in ys)
    return svg(numbers, line.label, f"Round by round: {said}.", parts, width, height)


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area: data to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y0) / (self.y1 - self.y0)


def grid(
    frame: Frame,
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    y_names: Sequence[str] | None = None,
) -> list[str]:
    """Horizontal grid lines, tick labels and the names of both axes."""
    parts = []
    for tick, name in zip(y_ticks, y_names or map(tick_label, y_ticks), strict=False):
        y = frame.y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>'
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        anchor = "end" if tick == x_ticks[-1] else "middle"
        shift = RIGHT if tick == x_ticks[-1] else 0
        parts.append(
            f'<text class="tick" x="{frame.x(tick) + shift:.1f}" y="{base + 15}" '
            f'text-anchor="{anchor}">{tick_label(tick)}</text>'
        )
    parts.append(
        f'<text class="axis-label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis-label" x="0" y="10">{escape(y_label)}</text>'
    )
    return parts


def svg(
    numbers: Numbering,
    title: str,
    description: str,
    parts: Sequence[str],
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Markup:
    """A picture with the title and the description that a screen reader says."""
    name = f"chart-{next(numbers)}"
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}'
        f"</desc>{''.join(parts)}</svg>"
    )
