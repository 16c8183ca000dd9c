"""One run on one lake: the lock, the round, and the settings they go with.

The parent flow and the stages inside it share a session; a stage started on its own opens one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flows.errors import MissingInput, SettingsError
from flows.settings import BootstrapSettings
from storage import Lake, by_hand, layout, registry, rounds
from storage.fingerprint import explain
from storage.tables import OnStale

logger = logging.getLogger(__name__)

LAST_LAKE = Path(".bootstrap") / "last_lake"
"""Where the commands of a folder remember the lake that was used last."""

OF_THE_TEXTS = ("world", "caption", "score")
"""Sections of the settings that a round's texts and their scores come from."""

_open_runs: dict[str, Run] = {}


class Run:
    """A lake, locked by this process, with the round that is worked on and its settings.

    Deliberately not a dataclass: Prefect walks dataclasses in task parameters field by field.
    """

    def __init__(
        self, lake: Lake, settings: BootstrapSettings, round: int, variant: str | None = None
    ) -> None:
        """With a `variant`, captions and scores are those of another decoding, beside the round's own."""
        self.lake = lake
        self.settings = settings
        self.round = round
        self.variant = variant

    @property
    def device(self) -> torch.device:
        """The device that models run on."""
        return choose_device(self.settings.machine.device)

    @property
    def on_stale(self) -> OnStale:
        """What to do with a committed part that was made from something else."""
        return self.settings.machine.on_stale


def choose_device(name: str) -> torch.device:
    """The torch device of a name; auto is CUDA where there is one. Raises SettingsError."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise SettingsError(f"machine.device {name!r} is none: give auto, cpu or cuda:N") from err
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"machine.device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; give "
            "auto or cpu, or install a CUDA build of torch"
        )
    return device


@contextmanager
def open_run(settings: BootstrapSettings, *, purpose: str) -> Iterator[Run]:
    """The session on `settings.machine.lake`: the one this process holds, or a new, locked one.

    Raises:
        LakeBusy: another process works on the lake; names it.
        SettingsChanged: the round was begun with other settings; names each field.
    """
    uri = settings.machine.lake
    held = _open_runs.get(uri)
    if held is not None:
        yield held
        return
    lake = opened(settings, create=True)
    with lake.lock(purpose):
        remember_lake(uri)
        by_hand.settle(lake)
        number = choose_round(lake, settings, purpose)
        champion = registry.champion(lake) if number > 1 else None
        rounds.begin_round(
            lake,
            number,
            settings.as_basis(),
            champion.model_id if champion else None,
            replace=settings.machine.on_stale == "rebuild",
        )
        run = Run(lake, settings, number)
        _open_runs[uri] = run
        try:
            yield run
        finally:
            del _open_runs[uri]


@contextmanager
def open_beside(
    settings: BootstrapSettings, *, purpose: str, round: int | None = None
) -> Iterator[Run]:
    """A session beside the rounds: it reads what a round made and adds to it, and takes no part in it.

    Without a round it is the latest. Training and evaluation may be set otherwise than the round's; what its texts
    were made by may not.

    Raises:
        LakeBusy: another process works on the lake; names it.
        MissingInput: the lake has no such round.
        SettingsError: the settings are those of other texts.
    """
    lake = opened(settings, create=False)
    with lake.lock(purpose):
        remember_lake(settings.machine.lake)
        known = [record.round for record in rounds.list_rounds(lake)]
        number = max(known, default=0) if round is None else round
        if number not in known:
            there = f"there is {', '.join(map(str, known))}" if known else "it has none"
            raise MissingInput(
                f"lake {settings.machine.lake} has no round {number or 1} ({there}); run `bootstrap run` or "
                "`bootstrap next-round` first"
            )
        began, now = rounds.settings_of(lake, number) or {}, settings.as_basis()
        texts = [{name: each.get(name) for name in OF_THE_TEXTS} for each in (began, now)]
        if differs := explain(*texts):
            raise SettingsError(
                f"round {number} of {settings.machine.lake} was made with other settings: {'; '.join(differs)}; "
                "give --config and --set as they were"
            )
        yield Run(lake, settings, number)


def opened(settings: BootstrapSettings, *, create: bool) -> Lake:
    """The lake of the settings, not locked. Raises SettingsError for a device that is not there, LakeNotFound."""
    _show_log_lines()
    choose_device(settings.machine.device)
    if settings.machine.num_threads:
        torch.set_num_threads(settings.machine.num_threads)
    scratch = settings.machine.scratch
    return Lake.open(
        settings.machine.lake,
        create=create,
        scratch_root=Path(scratch).expanduser().resolve() if scratch else None,
    )


def _show_log_lines() -> None:
    """Under a Prefect worker, let the project's own INFO lines reach the UI."""
    for name in os.environ.get("PREFECT_LOGGING_EXTRA_LOGGERS", "").split(","):
        if name:
            logging.getLogger(name).setLevel(logging.INFO)


def choose_round(lake: Lake, settings: BootstrapSettings, purpose: str) -> int:
    """The round to work on.

    full-cycle is always round 1 (done again, it finds nothing to do); next-round resumes an
    unfinished round or adds one; a single stage works on the latest.
    """
    latest = rounds.latest_round(lake)
    if settings.cycle == "next-round" and purpose == "bootstrap":
        if latest is None:
            raise MissingInput(
                f"lake {settings.machine.lake} has no round yet: run the full cycle first "
                "(`bootstrap run`, or `prefect deployment run bootstrap/full-cycle`)"
            )
        finished = latest.status != "running" and lake.root.exists(layout.report(latest.round))
        return latest.round + 1 if finished else latest.round
    if purpose == "bootstrap" or latest is None:
        return 1
    return int(latest.round)


def remember_lake(uri: str) -> None:
    """Note the lake as the one used last in this folder; a read-only folder costs only that."""
    try:
        LAST_LAKE.parent.mkdir(exist_ok=True)
        LAST_LAKE.write_text(uri + "\n", encoding="utf-8")
    except OSError as err:
        logger.debug("the last used lake was not noted: %s", err)
