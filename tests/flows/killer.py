"""Run the cycle and kill this very process with SIGKILL at a chosen instant.

usage: killer.py PLACE SETTINGS [compare]. With `compare` that flow runs. A place is `TABLE:NTH` (between the data and the manifest of the
NTH part that this process commits to TABLE, or under a name that begins so), `train:STAGE` (in the middle of a training),
`download` (while img2dataset works), `promote` (champion written, round not closed) or `report`.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLACE, SETTINGS = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_manifest(table: str, nth: int) -> None:
    from storage import tables

    original, seen = tables.write_manifest, []

    def write(root: Any, rel: str, manifest: Any) -> None:
        if table in (manifest.table, manifest.part.partition("-")[0]) and manifest.stage != "round":
            seen.append(rel)
            if len(seen) == nth:
                die()
        original(root, rel, manifest)

    tables.write_manifest = write


def in_training(stage: str) -> None:
    """Kill after the second checkpoint, a step further on."""

    def watch() -> None:
        work = Path(SETTINGS["machine"]["lake"]) / "work" / "train"
        while True:
            if len(list(work.glob(f"{stage}-*/steps/step-*/state.json"))) >= 2:
                die()
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()


def in_download() -> None:
    """Kill when the first shard of img2dataset lies there finished."""

    def watch() -> None:
        work = Path(SETTINGS["machine"]["lake"]) / "work"
        while not list(work.rglob("*_stats.json")):
            time.sleep(0.005)
        die()

    threading.Thread(target=watch, daemon=True).start()


def at_promotion() -> None:
    from storage import registry

    original = registry.promote

    def promote(lake: Any, model_id: str, round: int, why: str) -> Any:
        ref = original(lake, model_id, round, why)
        if round > 0:
            die()
        return ref

    registry.promote = promote


def at_report() -> None:
    from storage.fs import Root

    original = Root.write_bytes

    def write(self: Root, rel: str, data: bytes) -> None:
        if rel.startswith("reports/"):
            die()
        original(self, rel, data)

    Root.write_bytes = write  # type: ignore[method-assign]


def main() -> None:
    kind, _, detail = PLACE.partition(":")
    if kind == "train":
        in_training(detail)
    elif kind == "download":
        in_download()
    elif kind == "promote":
        at_promotion()
    elif kind == "report":
        at_report()
    else:
        before_manifest(kind, int(detail))
    from flows.bootstrap import bootstrap
    from flows.settings import parse_settings
    from flows.stages import compare

    flow = compare if sys.argv[3:] == ["compare"] else bootstrap
    flow(parse_settings(SETTINGS))
    sys.exit(f"{PLACE} was never reached")


main()
