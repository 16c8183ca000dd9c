"""A training that several processes share, started by the flow's own step."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cycle import ROOT, tiny_settings
from PIL import Image

from blip_core import TrainingError
from flows import rank
from flows.session import Run
from flows.settings import parse_settings
from flows.steps import train as train_step
from flows.steps.plan import TrainPlan
from flows.steps.plans import HUMAN_SQL
from flows.steps.ranks import ERROR
from flows.steps.train import train_model
from storage import CaptionSetConfig, Lake, build_trainset, ingest_captions, query

NUM_IMAGES = 12


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A lake of a few captioned pictures, and settings of two processes."""
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "images").mkdir()
    for index in range(NUM_IMAGES):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        texts = ("a red ring", "two blue squares on a white ground", "a cross")
        rows.append({"image": f"{index}.png", "caption": texts[index % 3]})
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tiny_settings(tmp_path / "lake", tmp_path / "world")
    settings["machine"]["train_processes"] = 2
    settings["model"] |= {"preset": "nano", "image_size_px": 32}  # has no dropout
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    config = CaptionSetConfig(
        captions=str(captions), images=str(tmp_path / "images"), pool="human", name="few"
    )
    ingest_captions(lake, config)
    return Run(lake, parse_settings(settings), 0)


def _plan(run: Run) -> TrainPlan:
    return TrainPlan(
        name="pretrain",
        role="med",
        round=0,
        sql=HUMAN_SQL,
        objectives=("lm",),
        parent=None,
        tokenizer_of=None,
        settings=run.settings.pretrain,
    )


def _curve(run: Run) -> list[float]:
    lines = query(run.lake, "SELECT value FROM metrics WHERE metric = 'loss_lm' ORDER BY n")
    return [row["value"] for row in lines.to_pylist()]


def test_training_in_two_processes_learns_what_one_would(run: Run, tmp_path: Path) -> None:
    told = []
    ref, built = train_model(run, _plan(run), lambda *progress: told.append(progress))
    assert built
    assert [step for step, _, _ in told] == [3, 6, 9]
    shared = _curve(run)
    again, built = train_model(run, _plan(run), lambda *_: None)
    assert (again, built) == (ref, False), "the number of processes makes no other model"

    machine = {"train_processes": 1}
    alone = run.settings.with_changes({"machine": machine})
    assert train_model(Run(run.lake, alone, 0), _plan(run), lambda *_: None) == (ref, False)
    copy = tmp_path / "copy"
    (run.lake.root.local_path("tables") / "metrics").rename(tmp_path / "shared-metrics")
    other = Run(Lake.open(str(tmp_path / "lake"), scratch_root=copy), alone, 0)
    _, built = train_model(other, _plan(other), lambda *_: None)
    assert built
    assert shared == pytest.approx(_curve(other), rel=1e-4)


def test_sharding_of_the_settings_reaches_the_engine(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def engine(*args: object, **kwargs: object) -> None:
        raise Seen(args[3].sharding)  # type: ignore[attr-defined]

    monkeypatch.setattr(train_step, "run_training", engine)
    rows = build_trainset(run.lake, HUMAN_SQL, name="pretrain")
    for sharding in ("full", "none"):
        changed = run.settings.with_changes({"machine": {"train_sharding": sharding}})
        with pytest.raises(Seen, match=sharding):
            train_step.fit(Run(run.lake, changed, 0), _plan(run), rows, tmp_path, lambda *_: None)


def test_rank_killed_in_the_middle_ends_the_others_and_the_same_command_goes_on_to_the_same_bits(
    run: Run, tmp_path: Path
) -> None:
    changes = {
        "machine": {"train_sharding": "full"},
        "model": {"dropout": 0.1},
        "pretrain": {"steps": 30, "checkpoint_every_steps": 4, "log_every_steps": 1},
    }
    run = Run(run.lake, run.settings.with_changes(changes), 0)
    strangers = set(psutil.Process().children(recursive=True))  # of tests before this one
    family: list[psutil.Process] = []

    def kill(step: int, *_: object) -> None:
        if step < 10 or family:
            return
        family.extend(set(psutil.Process().children(recursive=True)) - strangers)
        victims = [each for each in family if each.environ().get("RANK") == "1"]
        assert len(family) >= 3, "torchrun and two ranks"
        os.kill(victims[0].pid, signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"rank 1 was ended by SIGKILL: .* same command"):
        train_model(run, _plan(run), kill)
    assert psutil.wait_procs(family, timeout=30)[1] == []
    steps = []
    ref, built = train_model(run, _plan(run), lambda step, *_: steps.append(step))
    assert built
    assert 1 < steps[0] <= 13, "from the last checkpoint"
    assert steps[-1] == 30

    metrics = run.lake.root.local_path("tables") / "metrics"
    metrics.rename(tmp_path / "metrics-of-the-killed")
    undisturbed, built = train_model(run, _plan(run), lambda *_: None)
    assert built
    assert undisturbed.model_id == ref.model_id, "its id is the hash of its weights"


def test_training_in_processes_that_cannot_share_a_batch_says_why(run: Run) -> None:
    # the settings of a cycle are refused before this; a plan made by hand gets as far as the ranks
    settings = run.settings.pretrain.model_copy(update={"batch_size": 7})
    plan = dataclasses.replace(_plan(run), settings=settings)
    with pytest.raises(TrainingError, match="batch_size 7 cannot be shared equally by 2 ranks"):
        train_model(run, plan, lambda *_: None)


JOB: dict[str, Any] = {
    "settings": {"preset": None, "machine": {"device": "cpu"}},
    "round": 0,
    "scratch": None,
    "plan": {
        "name": "pretrain",
        "role": "med",
        "round": 0,
        "sql": HUMAN_SQL,
        "objectives": ["lm"],
        "parent": None,
        "tokenizer_of": None,
        "settings": {},
    },
    "rows": {},
}


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({}, "LakeNotFound", "no lake at"),
        (
            {"settings": {"preset": None, "machine": {"device": "cuda:1"}}, "world": "2"},
            "ConfigError",
            "one GPU",
        ),
        ({"settings": {"preset": None, "seeds": 1}}, "SettingsError", "seeds"),
        ({"parent": "none"}, "TypeError", "int"),
    ],
)
def test_rank_tells_type_and_message_of_every_error(
    changes: dict[str, Any], name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", changes.get("world", "1"))
    job = JOB | {"parent": os.getpid()} | changes
    job["settings"] = {**job["settings"]}
    if "machine" in job["settings"]:
        lake = {"lake": str(tmp_path / "lake")}
        job["settings"]["machine"] = job["settings"]["machine"] | lake
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(Exception, match=said) as raised:
        rank.main(tmp_path / "job.json")
    assert type(raised.value).__name__ == name
    assert (tmp_path / ERROR).read_text() == f"{name}: {raised.value}"


def test_rank_leaves_the_error_that_another_told_first(tmp_path: Path) -> None:
    (tmp_path / ERROR).write_text("OutOfMemoryError: the GPU is full")
    with pytest.raises(FileNotFoundError):
        rank.main(tmp_path / "job.json")
    assert (tmp_path / ERROR).read_text() == "OutOfMemoryError: the GPU is full"


def test_ranks_end_when_the_process_that_started_them_is_killed(run: Run, tmp_path: Path) -> None:
    settings = run.settings.with_changes({"pretrain": {"steps": 100_000}})
    path = tmp_path / "settings.json"
    path.write_text(settings.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from flows.session import Run;"
        "from flows.settings import parse_settings; from storage import Lake; import json;"
        "import test_train_ranks as t; from flows.steps.train import train_model;"
        f"s = parse_settings(json.loads(Path({str(path)!r}).read_text()));"
        "r = Run(Lake.open(s.machine.lake), s, 0);"
        "train_model(r, t._plan(r), lambda *_: None)"
    )
    folders = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    flow = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": folders},
        stderr=subprocess.DEVNULL,
    )
    family: list[psutil.Process] = []
    try:
        work = run.lake.scratch("train")
        for _ in range(600):
            if list(work.glob("pretrain-*/steps/step-*/state.json")):
                break
            assert flow.poll() is None
            time.sleep(0.1)
        else:
            pytest.fail("no checkpoint was written")
        family = psutil.Process(flow.pid).children(recursive=True)
        assert len(family) >= 3, "torchrun and two ranks"
        flow.kill()
        flow.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
    finally:
        for process in [flow, *family]:
            if (
                process.poll() is None
                if isinstance(process, subprocess.Popen)
                else process.is_running()
            ):
                process.kill()
