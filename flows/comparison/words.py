"""The comparison in words: a table for the terminal, one for Prefect's UI, and what may be said of it.

Figures are printed as papers print them, times 100.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from blip_core.seeds import Estimate
from flows.comparison.table import ComparedPolicy, Comparison

IN_TABLES = ("mean_recall", "i2t_r1", "t2i_r1", "itm_auc_hard", "cider", "caption_truth")
"""Of the metrics: those in a table, which has to fit on a screen; the figure and the JSON have all."""
SHORT = {
    "mean_recall": "mean recall",
    "i2t_r1": "i2t R@1",
    "t2i_r1": "t2i R@1",
    "itm_auc_random": "ITM AUC random",
    "itm_auc_hard": "ITM AUC hard",
    "cider": "CIDEr",
    "bleu4": "BLEU-4",
    "caption_truth": "true captions",
}
MIN_WIDTHS = {"C": 1, "F": 1, "policy": 12, "captions": 8, "noise": 5, "texts": 5, "seeds": 5}
WORDS = ("C", "F", "policy", "captions")
"""Columns of the table that hold no numbers."""
FIGURE_WIDTH = 14
"""Of a column of the terminal with values and their intervals."""
NO_FIGURE = "-"
YES, NO = "\N{CHECK MARK}", "-"


def terminal_tables(comparison: Comparison) -> list[Table]:
    """Figures of every policy, and differences to the baseline; both as wide as they need."""
    titles = [_title(comparison), f"Difference to {comparison.baseline}, paired by seed and image"]
    tables = []
    for title, rows in zip(titles, (_figure_rows, _gain_rows), strict=True):
        body = rows(comparison)
        if not body:
            continue
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        names = _names(comparison)
        for name in names:
            shown.add_column(
                name,
                justify="left" if name in WORDS else "right",
                overflow="fold",
                min_width=MIN_WIDTHS.get(name, FIGURE_WIDTH),
            )
        for row in body:
            shown.add_row(*(cell.replace(" (", "\n").rstrip(")") for cell in row))
        tables.append(shown)
    return tables


def markdown(comparison: Comparison) -> str:
    """The same as Markdown."""
    blocks = [f"# Round {comparison.round}: did it pay?", _title(comparison)]
    for rows in (_figure_rows(comparison), _gain_rows(comparison)):
        if rows:
            names = _names(comparison)
            lines = [names, ["---"] * len(names), *rows]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*blocks, *sentences(comparison), *notes(comparison)])


def sentences(comparison: Comparison) -> list[str]:
    """One for each policy beside the baseline: what is better, what is worse, what is within noise."""
    found = []
    for row in comparison.policies:
        gains = [(each.metric, each.gain) for each in row.figures if each.gain is not None]
        if not gains:
            continue
        parts = []
        for words, wanted in (("better in", 1), ("worse in", -1)):
            clear = [(m, g) for m, g in gains if g.is_clear and g.value * wanted > 0]
            if clear:
                named = ", ".join(f"{SHORT[m]} ({_signed(g.value)})" for m, g in clear)
                parts.append(f"{words} {named}")
        within = [SHORT[m] for m, g in gains if not g.is_clear]
        if within:
            everything = len(within) == len(gains)
            parts.append(
                "no difference beyond noise in any figure"
                if everything
                else f"within noise in {', '.join(within)}"
            )
        found.append(f"{row.name} against {comparison.baseline}: {'; '.join(parts)}.")
    return found


def notes(comparison: Comparison) -> list[str]:
    """How noisy each decoding's captions are, what the intervals cover, and what they do not."""
    images = f"{comparison.num_images} held-out images"
    found = _noise_notes(comparison)
    if not comparison.covers_seeds:
        return [
            *found,
            f"Intervals are 95 %, over {images} only. With one seed they say nothing about other seeds: what looks "
            "clear may be luck. Run again with --seeds 3 or more.",
        ]
    found.append(f"Intervals are 95 %, over seeds and {images}.")
    figures = sum(each.gain is not None for row in comparison.policies for each in row.figures)
    if figures > 1:
        found.append(
            f"Of {figures} differences without any effect, about {max(1, round(figures / 20))} would look clear by "
            "chance: settle beforehand which figure decides."
        )
    return found


def _noise_notes(comparison: Comparison) -> list[str]:
    """What share of each decoding's captions each policy drops, in words."""
    by_label: dict[str, list[str]] = {}
    for row in comparison.policies if comparison.has_decodings else ():
        if row.noise_ratio is not None:
            share = f"{_plain(row.noise_ratio)} % with {row.decoding}"
            by_label.setdefault(row.label, []).append(share)
    return [
        f"Noise, the share of the captions that {label} drops: {', '.join(shares)}."
        for label, shares in by_label.items()
    ]


def _title(comparison: Comparison) -> str:
    noise = "; noise: dropped captions in %" if comparison.has_decodings else ""
    return (
        f"Round {comparison.round}: new models, {comparison.steps} steps of {comparison.batch_size} pairs each, "
        f"on {comparison.num_images} held-out images (C: captioner, F: filter{noise}; figures x 100)"
    )


def _names(comparison: Comparison) -> list[str]:
    metrics = [SHORT[metric] for metric in _shown(comparison)]
    decodings = ["captions", "noise"] if comparison.has_decodings else []
    return ["C", "F", "policy", *decodings, "texts", "seeds", *metrics]


def _shown(comparison: Comparison) -> list[str]:
    return [metric for metric in IN_TABLES if metric in comparison.metrics]


def _figure_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [
            *_about(comparison, row),
            *(_cell(row, metric, gain=False) for metric in _shown(comparison)),
        ]
        for row in comparison.policies
    ]


def _gain_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [
            *_about(comparison, row),
            *(_cell(row, metric, gain=True) for metric in _shown(comparison)),
        ]
        for row in comparison.policies
        if any(each.gain is not None for each in row.figures)
    ]


def _about(comparison: Comparison, row: ComparedPolicy) -> Sequence[str]:
    marks = (YES if row.has_captioner else NO, YES if row.has_filter else NO)
    noise = NO_FIGURE if row.noise_ratio is None else _plain(row.noise_ratio)
    decoded = (row.decoding or NO_FIGURE, noise) if comparison.has_decodings else ()
    return (*marks, row.label, *decoded, f"{row.num_texts:,}", str(len(row.seeds)))


def _cell(row: ComparedPolicy, metric: str, *, gain: bool) -> str:
    figure = row.figure(metric)
    estimate: Estimate | None = None
    if figure is not None:
        estimate = figure.gain if gain else figure.mean
    if estimate is None:
        return NO_FIGURE
    shown = _signed if gain else _plain
    return f"{shown(estimate.value)} ({shown(estimate.low)} to {shown(estimate.high)})"


def _plain(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"
