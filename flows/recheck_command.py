"""`bootstrap recheck`: kept images are asked for again, and purged when their site opts out now or has taken them down."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from flows.errors import SettingsError

if TYPE_CHECKING:
    from flows.settings import BootstrapSettings


def register(commands: Any, command: Any, settings_options: Any) -> None:
    """Add the command."""
    sub = command(
        commands,
        "recheck",
        "ask again for a share of the kept images, and purge those that have opted out since",
        _recheck,
    )
    settings_options(sub)
    sub.add_argument(
        "--within",
        type=int,
        default=8,
        metavar="ROUNDS",
        help="ask for all within so many rounds: this time for one share of as many (default 8)",
    )
    sub.add_argument("--most", type=int, default=1_000_000, help="ask for no more images than this")
    sub.add_argument("--dry-run", action="store_true", help="say what would go, purge nothing")


def _recheck(options: argparse.Namespace) -> int:
    from flows.cli import settings_from

    for name in ("within", "most"):
        if getattr(options, name) < 1:
            raise SettingsError(f"--{name} must be 1 or more, got {getattr(options, name)}")
    return _ask_again(settings_from(options), options.within, options.most, dry_run=options.dry_run)


def _ask_again(settings: BootstrapSettings, within: int, most: int, *, dry_run: bool) -> int:
    """Ask for the share whose turn it is by the latest round, purge what wishes to go, and tell both."""
    from flows.purge_command import lines_of
    from flows.steps.recheck import recheck_lake
    from flows.terminal import console
    from storage import Lake

    lake = Lake.open(settings.machine.lake, read_only=dry_run)
    done = recheck_lake(lake, settings, within=within, most=most, dry_run=dry_run)
    outcomes = done.found.outcomes
    told = ", ".join(f"{said} {number:,}" for said, number in outcomes.most_common())
    console.print(
        f"asked for {outcomes.total():,} images, share {done.part + 1} of {done.parts}: {told or 'none'}",
        highlight=False,
    )
    for reason, image_ids in sorted(done.found.to_purge.items()):
        console.print(f"{len(image_ids):,} to purge: {reason}", highlight=False)
    for purged in done.purged:
        for line in lines_of(purged):
            console.print(line, highlight=False)
    return 0
