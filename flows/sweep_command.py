"""`bootstrap sweep`: what a policy would keep at each of many values of one parameter, and how noisy that would be."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flows.errors import SettingsError

Estimate = Callable[[str, np.ndarray, np.ndarray], "tuple[float, float, float] | None"]
"""(source, texts (B,), kept (B,)) by range of scores to the share of noise among the kept: value, low, high."""

MAX_VALUES = 1000
STYLE = (
    "svg{background:#fff}text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.axis{stroke:#888}"
    ".line{fill:none;stroke-width:1.8}.web{stroke:#1f5fa8}.synthetic{stroke:#c2571a}"
)


def register(commands: Any, command: Any) -> None:
    """Add the command."""
    sub = command(commands, "sweep", "what a policy keeps over many values of a parameter", _sweep)
    sub.add_argument("--policy", default="blip", help="a name, or the path of a .sql file")
    sub.add_argument(
        "--over",
        required=True,
        metavar="NAME=FROM:TO:STEP",
        help="or NAME=VALUE,VALUE,...; ends included",
    )
    sub.add_argument("--set", dest="overrides", action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--round", type=int, help="the latest scored one when not given")
    sub.add_argument("--lake", help="lake to read; else BOOTSTRAP_LAKE, else the last used here")
    sub.add_argument(
        "--plot",
        metavar="FILE.svg",
        help="draw the kept shares, and the noise left where it is known",
    )
    sub.add_argument("--json", action="store_true", help="rows for scripts in place of a table")


def values_of(over: str) -> tuple[str, list[float | str]]:
    """`threshold=0.05:0.95:0.05` to the parameter and its values. Raises SettingsError for what is no range."""
    name, equals, text = over.partition("=")
    ends = text.split(":")
    try:
        if not (name and equals and text):
            raise ValueError("it needs a name and values")
        if len(ends) == 1:
            return name, [_plain(word) for word in text.split(",")]
        start, stop, step = (float(end) for end in ends)
        if not all(map(math.isfinite, (start, stop, step))) or step <= 0 or stop < start:
            raise ValueError("FROM must not be above TO, and STEP must be above 0")
        num = math.floor((stop - start) / step + 1e-9) + 1
        if num > MAX_VALUES:
            raise ValueError(f"{num} values are more than {MAX_VALUES}")
        return name, [round(start + i * step, 10) for i in range(num)]
    except ValueError as err:
        raise SettingsError(
            f"--over {over!r}: {err}; give NAME=FROM:TO:STEP, such as threshold=0.05:0.95:0.05, or NAME=VALUE,VALUE"
        ) from err


def noise_estimate(
    con: Any, round: int, cuts: Sequence[float]
) -> tuple[str, np.ndarray, Estimate] | None:
    """What the round's canaries say of any kept set: the number they are told by, the ranges' edges, the estimate.

    None where the round has no canaries.
    """
    from blip_core.noise import NoiseModel, score_ranges, share_of_draws
    from flows.steps.audit import canary_scores, noise_draws

    scores = canary_scores(con, round)
    if scores is None or len(scores.of_kind) < 2 or "true" not in scores.of_kind:
        return None
    edges = score_ranges(np.concatenate(list(scores.of_kind.values())), cuts)
    model = NoiseModel(scores.of_kind, edges)

    def estimate(
        source: str, texts: np.ndarray, kept: np.ndarray
    ) -> tuple[float, float, float] | None:
        if not kept.any():
            return None
        first = int(np.flatnonzero(kept)[0])  # whatever the policy, nothing below is kept
        cut = -math.inf if first == 0 else float(edges[first - 1])
        _, left = noise_draws(scores, source, model, texts, kept, cut)
        if left is None:
            return None
        share = share_of_draws(left, int(kept.sum()))
        return share.value, share.low, share.high

    return scores.number, edges, estimate


def _sweep(options: argparse.Namespace) -> int:
    from flows.cli import find_lake
    from flows.decide_command import bare_values, scored_round
    from storage import Lake, connect
    from storage.sweep import sweep

    lake = Lake.open(find_lake(options.lake), read_only=True)
    round = scored_round(lake, options.round)
    name, values = values_of(options.over)
    cuts = [value for value in values if isinstance(value, float)] if name == "threshold" else []
    with connect(lake) as con:
        known = noise_estimate(con, round, cuts)
    number, edges, estimate = known or ("itm_prob", None, None)
    rows = [
        _record(row, estimate)
        for row in sweep(
            lake,
            round,
            options.policy,
            name,
            values,
            bare_values(options.overrides),
            number=number,
            edges=edges,
        )
    ]
    if options.plot:
        _plot(Path(options.plot), rows, name, f"{options.policy}, round {round}")
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        _print(rows, name, bool(estimate))
    return 0


def _record(row: Any, estimate: Estimate | None) -> dict[str, Any]:
    noise = estimate(row.source, *row.ranges) if estimate and row.ranges is not None else None
    value, low, high = noise or (None, None, None)
    return {
        "value": row.value,
        "source": row.source,
        "texts": row.texts,
        "kept": row.kept,
        "share": row.share,
        "precision": None if value is None else 1 - value,
        "noise_left": value,
        "noise_left_low": low,
        "noise_left_high": high,
    }


def _print(rows: list[dict[str, Any]], name: str, is_estimated: bool) -> None:
    from flows.terminal import console, table

    sources = list(dict.fromkeys(row["source"] for row in rows))
    found = {(row["value"], row["source"]): row for row in rows}
    names = [name]
    for source in sources:
        names += [f"{source} kept", "share"] + (
            ["precision", "noise left (95 %)"] if is_estimated else []
        )
    lines = []
    for value in dict.fromkeys(row["value"] for row in rows):
        line = [f"{value:g}" if isinstance(value, float) else str(value)]
        for source in sources:
            row = found[value, source]
            line += [f"{row['kept']:,}", f"{row['share']:.1%}"]
            if is_estimated and row["noise_left"] is None:
                line += ["-", "-"]
            elif is_estimated:
                interval = f"({row['noise_left_low']:.1%} to {row['noise_left_high']:.1%})"
                line += [f"{row['precision']:.1%}", f"{row['noise_left']:.1%} {interval}"]
        lines.append(line)
    console.print(table(names, lines))
    if not is_estimated:
        console.print(
            "no canaries in this round: precision and noise left are not known", style="dim"
        )


def _plot(path: Path, rows: list[dict[str, Any]], name: str, title: str) -> None:
    """Kept share, and noise left where it is estimated, over the values; one line a source."""
    from flows.report.charts import HEIGHT, WIDTH, Line, line_chart, numbering

    if path.suffix != ".svg":
        raise SettingsError(f"--plot {path}: drawings are SVG; give a name that ends in .svg")
    numbers, charts = numbering(), []
    for field, label in (("share", "share kept"), ("noise_left", "noise left, estimated")):
        lines = []
        for source in dict.fromkeys(row["source"] for row in rows):
            points = [
                (float(row["value"]), float(row[field]))
                for row in rows
                if row["source"] == source
                and row[field] is not None
                and not isinstance(row["value"], str)
            ]
            if points:
                lines.append(Line(label=source, style=source, points=points))
        if lines:
            said = f"{label}: {', '.join(line.label for line in lines)}; {title}"
            charts.append(line_chart(numbers, said, lines, x_label=name, y_label=label))
    if not charts:
        raise SettingsError(f"--plot {path}: values of {name} are words, which have no axis")
    placed = "".join(
        f'<svg x="{WIDTH * i}" y="0" width="{WIDTH}" height="{HEIGHT}"{str(chart).removeprefix("<svg")}'
        for i, chart in enumerate(charts)
    )
    size = f'width="{WIDTH * len(charts)}" height="{HEIGHT}"'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{placed}</svg>\n',
        encoding="utf-8",
    )


def _plain(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word.strip()
