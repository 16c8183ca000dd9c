"""Unfinished work on this machine: what it was made of may be what is purged, so it goes and is begun again."""

import shutil

from storage import layout
from storage.lake import Lake

STAY = ("models", "tensorboard")
"""Copies of weights, and curves of losses: nothing of any image."""


def unfinished(lake: Lake) -> list[str]:
    """Names of what lies in the scratch folder and is to go, with how much it is."""
    found = []
    work = lake.root.local_path(layout.WORK)
    if work is not None and lake.scratch_root is None and not work.exists():
        return []  # looking must not make it
    for path in sorted(lake.scratch().iterdir()):
        if path.name not in STAY:
            files = (
                [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
            )
            if files:
                found.append(f"{path.name} ({sum(f.stat().st_size for f in files):,} bytes)")
    return found


def throw_away(lake: Lake) -> None:
    """Remove unfinished work, and writes that killed processes left (hold the lake's lock)."""
    for path in lake.scratch().iterdir():
        if path.name not in STAY:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in (
        layout.TABLES,
        layout.SHARDS,
        layout.MODELS,
        layout.ROUNDS,
        layout.TRAINSETS,
        layout.REPORTS,
        layout.PURGES,
    ):
        lake.root.sweep(folder)
    lake.root.sweep("", max_depth=1)
