"""`bootstrap ingest --dry-run N`: what the lists of the settings will give, from N rows of each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.errors import SettingsError

if TYPE_CHECKING:
    from flows.settings import BootstrapSettings
    from storage.intake.trial import Trial


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `ingest` beside the settings."""
    sub.add_argument(
        "--dry-run",
        type=int,
        metavar="N",
        help="fetch N rows of each list, say what the whole will give, and keep nothing",
    )


def is_trial(options: argparse.Namespace) -> bool:
    """Whether rows are only tried."""
    return getattr(options, "dry_run", None) is not None


def try_lists(settings: BootstrapSettings, rows: int) -> int:
    """Try the lists of the settings, and print what came."""
    from flows.steps.ingest import download_config, served_lists
    from flows.terminal import console
    from storage import UrlListConfig
    from storage.intake.trial import try_list

    if rows < 1:
        raise SettingsError(
            f"--dry-run {rows}: try 1 row or more; 1,000 tell a share to 3 points either way"
        )
    with served_lists(settings) as given:
        if not given.url_lists:
            raise SettingsError(
                "--dry-run: ingest.url_lists names no list; give one, see `bootstrap settings --describe`"
            )
        for each in given.url_lists:
            url_list = UrlListConfig(**each.model_dump())
            trial = try_list(
                url_list, download_config(given, settings.machine.device), rows, seed=settings.seed
            )
            for shown in (outcome_table(each.path, trial), *expectation(trial)):
                console.print(shown, highlight=False)
    return 0


def outcome_table(path: str, trial: Trial) -> object:
    """Statuses of the rows that were tried, and what they make of the whole list."""
    from rich import box
    from rich.table import Table

    from blip_core.rates import Rate

    shown = Table(
        title=f"{trial.num_tried:,} of {trial.num_listed:,} rows of {path}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, side in (("status", "left"), ("rows", "right"), ("share", "right")):
        shown.add_column(name, justify=side)  # type: ignore[arg-type]
    shown.add_column("95 %", justify="right")
    shown.add_column("such as", overflow="fold")
    for status, hits in trial.outcomes.most_common():
        rate = Rate(hits=hits, n=trial.num_tried)
        low, high = rate.interval()
        shown.add_row(
            status,
            f"{hits:,}",
            f"{100 * rate.value:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            trial.reasons.get(status, ""),
        )
    return shown


def expectation(trial: Trial) -> list[str]:
    """What the whole list will give, take and need, in sentences."""
    from blip_core.rates import Rate

    low, high = Rate(hits=trial.num_ok, n=trial.num_tried).interval()
    listed = trial.num_listed
    lines = [
        f"Expected of all rows: {listed * trial.num_ok / trial.num_tried:,.0f} images "
        f"({listed * low:,.0f} to {listed * high:,.0f})."
    ]
    if trial.num_ok:
        size = trial.image_bytes / trial.num_ok
        whole = size * listed * trial.num_ok / trial.num_tried
        lines.append(f"Stored: {_bytes(size)} an image, {_bytes(whole)} in all.")
    rate = trial.num_tried / trial.seconds
    lines.append(
        f"Time: {trial.seconds:.0f} s for these, which is {rate:.3g} rows a second with start-up and waits; at that rate "
        f"{_duration(listed / rate)} for all. A long run is faster: it starts once, and waits for many hosts at a time."
    )
    return lines


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"
