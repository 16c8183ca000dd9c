"""`bootstrap compare`: did filtering and captioning pay? Models of several policies, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.comparison.table import Comparison
    from flows.settings import BootstrapSettings

WIDTH = 150
"""Columns of the table where the output is not a terminal."""
WIDTH_OF_DECODINGS = 20
"""As many more where it says how captions were decoded."""

Command = Callable[[argparse.Namespace], int]
AddCommand = Callable[[Any, str, str, Command], argparse.ArgumentParser]


def register(
    commands: Any, add: AddCommand, settings_options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add the command; `add` makes one with what all have."""
    text = "train models on what several policies keep, and tell which is better"
    sub = add(commands, "compare", text, _compare)
    settings_options(sub)
    sub.add_argument("--policies", metavar="P,...", help="such as raw,blip,blip:threshold=0.7")
    sub.add_argument(
        "--decodings", metavar="D,...", help="of captions, such as nucleus,beam; the round's own"
    )
    sub.add_argument("--seeds", type=int, help="models of each policy; 3 when not given")
    sub.add_argument("--steps", type=int, help="optimizer steps of each; the retraining's")
    sub.add_argument("--round", type=int, help="round whose texts are used; the latest")
    sub.add_argument(
        "--discard-models", action="store_true", help="keep the figures, not the models' weights"
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    sub.add_argument("--figure", type=Path, metavar="FILE", help="write the figure as SVG")


def _compare(options: argparse.Namespace) -> int:
    from flows.cli import bars
    from flows.stages import compare

    settings = _settings(options)
    _refuse_unwritable(options)
    with bars():
        comparison = compare(settings)
    show(comparison)
    if options.json:
        options.json.write_text(as_json(comparison), encoding="utf-8")
    if options.figure:
        from flows.comparison.figure import figure_svg

        options.figure.write_text(figure_svg(comparison), encoding="utf-8")
    return 0


def show(comparison: Comparison) -> None:
    """Print tables, sentences and notes."""
    from rich.console import Console

    from flows.comparison import words
    from flows.terminal import console

    width = WIDTH + (WIDTH_OF_DECODINGS if comparison.has_decodings else 0)
    wide = Console(width=None if console.is_terminal else width)
    for table in words.terminal_tables(comparison):
        wide.print(table)
    for line in [*words.sentences(comparison), *words.notes(comparison)]:
        wide.print(line, highlight=False, markup=False)


def as_json(comparison: Comparison) -> str:
    """The comparison as JSON; figures as they are, not times 100."""
    return json.dumps(dataclasses.asdict(comparison), indent=2) + "\n"


def _settings(options: argparse.Namespace) -> BootstrapSettings:
    from flows.cli import settings_from

    asked = {
        **{name: _named(getattr(options, name)) for name in ("policies", "decodings")},
        "seeds": options.seeds,
        "steps": options.steps,
        "round": options.round,
        "keep_models": False if options.discard_models else None,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return settings_from(options, **({"compare": given} if given else {}))


def _named(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _refuse_unwritable(options: argparse.Namespace) -> None:
    """A comparison takes hours: what it is to be written to is looked at first."""
    from flows.errors import SettingsError

    for name in ("json", "figure"):
        path: Path | None = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise SettingsError(f"--{name} {path}: there is no folder {path.absolute().parent}")
