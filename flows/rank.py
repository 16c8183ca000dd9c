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
from pathlib import Path

import psutil
import torch

from blip_core import BlipError
from blip_core.distributed import join_world
from flows.errors import FlowsError
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.ranks import ERROR, HISTORY, PROGRESS
from flows.steps.train import TrainPlan, fit
from storage import Lake, ModelRef, StorageError, TrainSetRef

SECONDS_BETWEEN_LOOKS = 1.0


def main(path: Path) -> int:
    """Train this rank's part of the job in `path`; returns the exit status."""
    job = json.loads(path.read_text(encoding="utf-8"))
    _end_with(job["parent"])
    settings = parse_settings(job["settings"])
    plan_values = job["plan"]
    for name in ("parent", "tokenizer_of"):
        if plan_values[name] is not None:
            plan_values[name] = ModelRef(**plan_values[name])
    section = type(settings.pretrain).model_validate(plan_values.pop("settings"))
    objectives = tuple(plan_values.pop("objectives"))
    plan = TrainPlan(settings=section, objectives=objectives, **plan_values)
    if settings.machine.num_threads:
        torch.set_num_threads(settings.machine.num_threads)
    with join_world(settings.machine.device) as (world, device):
        settings = settings.with_changes({"machine": {"device": str(device)}})
        scratch = Path(job["scratch"]) if job["scratch"] else None
        lake = Lake.open(settings.machine.lake, scratch_root=scratch)
        run = Run(lake, settings, job["round"])

        def tell(step: int, steps: int, text: str) -> None:
            sys.stdout.write(f"{PROGRESS}{json.dumps([step, steps, text])}\n")
            sys.stdout.flush()

        try:
            history = fit(run, plan, TrainSetRef(**job["rows"]), path.parent, tell)
        except (BlipError, StorageError, FlowsError) as err:
            (path.parent / ERROR).write_text(str(err), encoding="utf-8")
            sys.stderr.write(f"rank {world.rank}: {err}\n")
            return 1
        if world.is_first:
            (path.parent / HISTORY).write_text(json.dumps(history), encoding="utf-8")
        world.wait()
    return 0


def _end_with(parent: int) -> None:
    """End this process when the flow that started it has ended, so that nothing trains on unseen."""
    process = psutil.Process(parent)

    def watch() -> None:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
