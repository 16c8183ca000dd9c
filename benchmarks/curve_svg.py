"""Curves of a training as a plain SVG: a panel for each kind of number, phases side by side.

No drawing library: a page in docs/results must not need one.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

PANELS = (
    ("train: contrastive loss", ("loss_itc",)),
    ("train: matching loss (.637 is a constant answer)", ("loss_itm",)),
    ("train: captioning loss", ("loss_lm",)),
    ("dev: mean recall, ITC of all five texts", ("mean_recall",)),
    (
        "dev: mean recall of one text an image, ITC and re-ranked",
        ("thin_mean_recall", "reranked_mean_recall"),
    ),
    ("dev: ITM AUC, random and hard negatives", ("itm_auc_random", "itm_auc_hard")),
)
COLOURS = ("#1f5fa8", "#c2571a")
WIDTH, HEIGHT, COLUMNS = 300, 170, 3
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 26
FEW = 10
"""Curves of fewer points show each of them."""
Point = tuple[float, float]


def points_of(phases: dict[str, dict[str, Any]], name: str) -> list[Point]:
    """Return (step, value) of one number; the steps of a phase go on from the phase before."""
    points, before = [], 0
    for phase in phases.values():
        lines = [line for line in phase["history"] if line.get(name) is not None]
        points += [(before + line["step"], float(line[name])) for line in lines]
        before += phase["steps"]
    return points


def draw_curves(phases: dict[str, dict[str, Any]]) -> str:
    """Return the SVG of all panels that have points."""
    last = sum(phase["steps"] for phase in phases.values())
    ends, total = [], 0
    for phase in phases.values():
        total += phase["steps"]
        ends.append(total)
    drawn = []
    for title, names in PANELS:
        curves = {name: points for name in names if (points := points_of(phases, name))}
        if curves:
            drawn.append((title, curves))
    rows = -(-len(drawn) // COLUMNS)
    parts = [
        _panel(title, curves, last, ends[:-1], index % COLUMNS * WIDTH, index // COLUMNS * HEIGHT)
        for index, (title, curves) in enumerate(drawn)
    ]
    size = f"{min(COLUMNS, len(drawn)) * WIDTH} {rows * HEIGHT}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
        'font-family="sans-serif" font-size="10" fill="#222">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _panel(
    title: str,
    curves: dict[str, list[Point]],
    last: int,
    borders: Sequence[int],
    x0: int,
    y0: int,
) -> str:
    """Return one panel at (x0, y0); dotted lines are borders of phases."""
    values = [value for points in curves.values() for _, value in points]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(step: float) -> float:
        return LEFT + (right - LEFT) * step / max(1, last)

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * (value - low) / (high - low)

    parts = [
        f'<g transform="translate({x0} {y0})">',
        f'<text x="{LEFT}" y="14" font-size="9.5">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#888"/>',
    ]
    parts += [
        f'<text x="{LEFT - 4}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low, (low + high) / 2, high)
    ]
    for step in (0, last):
        anchor = "end" if step else "start"
        parts.append(
            f'<text x="{x(step):.1f}" y="{bottom + 13}" text-anchor="{anchor}">{step}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{bottom + 13}" text-anchor="middle">step</text>'
    )
    parts += [
        f'<path d="M{x(step):.1f} {TOP}V{bottom}" stroke="#888" stroke-dasharray="2 3"/>'
        for step in borders
    ]
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        if len(points) < FEW:
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2" fill="{colour}"/>'
                for step, value in points
            ]
        if len(curves) > 1:
            place = TOP + 4 + 12 * number
            parts.append(f'<text x="{LEFT + 6}" y="{place}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</g>"])
