"""What the `bootstrap` command puts into its environment, for itself and the processes that it starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

WAIT_POLICY = "OMP_WAIT_POLICY"
"""How threads of OpenMP wait. They spin by default, which takes the time of whoever shares the cores."""
SERVER_START_SECONDS = "180"
"""Prefect gives its in-process server 20 s to start, which a busy machine does not always manage."""


def prepare(verbose: bool) -> None:
    """No telemetry, no chatter, threads that sleep while they wait; only where the user chose nothing.

    Comes before Prefect and torch are imported: both read it as they load.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    level = "INFO" if verbose else "CRITICAL"
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", level)
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", level)
    if "PREFECT_API_URL" not in os.environ:
        _choose_api()
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )
    for name in ("flows", "storage", "blip_core"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)


def _choose_api() -> None:
    """The server of `bootstrap up` while it runs; else Prefect's in-process one, its state here."""
    from flows.server import running

    if running(Path.cwd()) is not None:
        return  # prefect.toml, which `up` wrote here, names it
    if Path("prefect.toml").is_file():
        os.environ["PREFECT_API_URL"] = ""  # a server that is gone must not be waited for
    home = Path(os.environ.setdefault("PREFECT_HOME", str(Path(".bootstrap/prefect").absolute())))
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", SERVER_START_SECONDS)
