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
    return recheck_lake(
        settings_from(options), options.within, options.most, dry_run=options.dry_run
    )


def recheck_lake(settings: BootstrapSettings, within: int, most: int, *, dry_run: bool) -> int:
    """Ask for the share whose turn it is by the latest round, and purge what wishes to go."""
    from flows.purge_command import around, lines_of
    from flows.steps.ingest import download_config, served_lists
    from flows.terminal import console
    from storage import Lake, rounds
    from storage.intake.recheck import recheck
    from storage.purge import Request, asked_image, purge

    lake = Lake.open(settings.machine.lake, read_only=dry_run)
    last = rounds.latest_round(lake)
    part = last.round if last is not None else 0
    with served_lists(settings) as given:
        found = recheck(lake, download_config(given), part=part, parts=within, most=most)
    told = ", ".join(f"{said} {number:,}" for said, number in found.outcomes.most_common())
    console.print(
        f"asked for {found.outcomes.total():,} images, share {part % within + 1} of {within}: {told or 'none'}",
        highlight=False,
    )
    for reason, image_ids in sorted(found.to_purge.items()):
        console.print(f"{len(image_ids):,} to purge: {reason}", highlight=False)
        if not dry_run:
            asked = tuple(asked_image(each) for each in image_ids)
            done = purge(lake, Request(asked=asked, because=reason), around())
            for line in lines_of(done):
                console.print(line, highlight=False)
    return 0
