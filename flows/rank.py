"""One process of a training that several share; torchrun starts it with the path of a job.

It trains what the job says and leaves model and history in the job's folder. The lake is only read: the flow
that waits for it holds the lock and commits.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from blip_core.distributed import join_world
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.plan import TrainPlan
from flows.steps.ranks import ERROR, HISTORY, PROGRESS
from flows.steps.train import fit
from flows.train_section import TrainSettings
from storage import Lake, ModelRef, TrainSetRef

SECONDS_BETWEEN_LOOKS = 1.0


def main(path: Path) -> None:
    """Train this rank's part of the job in `path`; whatever error ends it is told in the job's folder."""
    with _told(path.parent):
        _train(path)


def _train(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    _end_with(job["parent"])
    settings = parse_settings(job["settings"])
    if settings.machine.num_threads:
        torch.set_num_threads(settings.machine.num_threads)
    plan = _plan(job["plan"])
    # told within the group too: when it ends, the other ranks fail of that and would tell it first
    with join_world(settings.machine.device) as (world, device), _told(path.parent):
        settings = settings.with_changes({"machine": {"device": str(device)}})
        scratch = Path(job["scratch"]) if job["scratch"] else None
        lake = Lake.open(settings.machine.lake, scratch_root=scratch)
        run = Run(lake, settings, job["round"])
        dev = TrainSetRef(**job["dev"]) if job["dev"] else None
        history = fit(run, plan, TrainSetRef(**job["rows"]), path.parent, _tell, dev=dev)
        if world.is_first:
            (path.parent / HISTORY).write_text(json.dumps(history), encoding="utf-8")
        world.wait()


def _plan(values: dict[str, Any]) -> TrainPlan:
    """The plan that `flows.steps.train` wrote as JSON."""
    refs = {
        name: ModelRef(**values[name]) if values[name] is not None else None
        for name in ("parent", "tokenizer_of")
    }
    settings = TrainSettings.model_validate(values["settings"])
    objectives = tuple(values["objectives"])
    return TrainPlan(**{**values, **refs, "settings": settings, "objectives": objectives})


def _tell(step: int, steps: int, text: str) -> None:
    sys.stdout.write(f"{PROGRESS}{json.dumps([step, steps, text])}\n")
    sys.stdout.flush()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Write type and message of an error where the flow reads it, unless there is an earlier one."""
    try:
        yield
    except Exception as err:
        with suppress(OSError), (folder / ERROR).open("x", encoding="utf-8") as file:
            file.write(f"{type(err).__name__}: {err}")
        raise


def _end_with(parent: int) -> None:
    """End this process when the flow that started it has ended, so that nothing trains on unseen."""
    process = psutil.Process(parent)

    def watch() -> None:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
