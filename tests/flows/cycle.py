"""A cycle small enough for tests, run as a process of its own, and what it leaves behind."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from storage import Lake, drop_part, list_parts

ROOT = Path(__file__).resolve().parents[2]
VARYING = {
    "pairs": ["fetched_at"],
    "models": ["created_at"],
    "rounds": ["started_at", "finished_at", "seconds", "device_seconds", "speed"],
}
"""Columns that hold times: the only ones that may differ between two runs."""
COMMITTED = ("tables", "shards", "models", "trainsets", "rounds", "champion.json")
"""What a finished cycle leaves for good."""


@dataclass(frozen=True)
class FinishedCycle:
    """A lake after one full cycle."""

    folder: Path
    lake: Path
    config: Path
    settings: dict[str, Any]
    output: str


def tiny_settings(lake: Path, world: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a whole cycle in seconds of compute; `changes` replace whole sections."""
    train = {
        "steps": 9,
        "batch_size": 12,
        "learning_rate": 1e-3,
        "label_smoothing": 0.0,
        "queue_size": 24,
        "augment": "none",
        "max_text_tokens": 16,
        "checkpoint_every_steps": 3,
        "log_every_steps": 3,
    }
    settings: dict[str, Any] = {
        "preset": None,
        "machine": {"lake": str(lake), "device": "cpu", "num_threads": 1, "decode_workers": 1},
        "world": {
            "folder": str(world),
            "num_web": 60,
            "num_human": 20,
            "num_heldout": 16,
            "human_captions": 2,
            "fault_share": 0.1,
            "image_size_px": 32,
            "slow_seconds": 2.0,
        },
        "ingest": {
            "image_size_px": None,
            "shard_rows": 25,
            "timeout_s": 1.0,
            "threads": 8,
            "retry_passes": 0,
            "eval_overlap": "keep",
            "recheck_within_rounds": None,
            "ask_again_rounds": 0,
            "texts_per_image": 1,
        },
        "model": {"preset": "tiny", "tokenizer": "train", "vocab_size": 200},
        "pretrain": train,
        "captioner": train | {"dev_share": 0.25, "evaluate_every_steps": 4, "patience": 2},
        "filter": train,
        "caption": {"max_new_tokens": 8, "batch_size": 16},
        "score": {"max_text_tokens": 16, "batch_size": 16},
        # Two random models score anything: keep some, so that there is a clean set to train on.
        "decide": {"threshold": 0.2},
        "audit": {"canary_share": 0.25, "min_canary_images": 2, "judge_sample": 40},
        "evaluate": {"rerank_k": 4, "max_new_tokens": 8, "batch_size": 16},
        "gate": {"max_recall_drop": 1.0},
        "report": {"gallery_pairs": 3},
    }
    return settings | changes


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    """Settings as a preset file, which JSON is too."""
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def copied(finished: FinishedCycle, folder: Path) -> FinishedCycle:
    """The same lake again below `folder`, for a test that changes it."""
    lake = folder / "lake"
    shutil.copytree(finished.lake, lake)
    settings = finished.settings | {"machine": finished.settings["machine"] | {"lake": str(lake)}}
    config = write_settings(folder / "tiny.yaml", settings)
    return FinishedCycle(
        folder=folder, lake=lake, config=config, settings=settings, output=finished.output
    )


def drop_later_rounds(lake: Path) -> None:
    """Take away what a second round has added to a copied lake."""
    for path in sorted(lake.rglob("*0002")):
        if path.name in ("0002", "round=0002") and path.is_dir():
            shutil.rmtree(path)


def before_captioning(finished: FinishedCycle, folder: Path) -> FinishedCycle:
    """A copy as the lake stood with the models of round 1 and neither captions nor scores of it.

    Other tests of the session may have added a round to the original.
    """
    cycle = copied(finished, folder)
    drop_later_rounds(cycle.lake)
    lake = Lake.open(str(cycle.lake))
    for table in ("captions", "scores"):
        for part in list_parts(lake, table, 1):
            drop_part(lake, part)
    return cycle


def bootstrap(
    *arguments: str, cwd: Path, api_url: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the real command in `cwd`, with a server of the test's or its own in-process one."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        env=command_environment(api_url) | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def command_environment(api_url: str | None = None) -> dict[str, str]:
    """The tests' own environment, less what would name another lake or server."""
    dropped = ("PREFECT_API_URL", "BOOTSTRAP_LAKE", "PREFECT_HOME", "PREFECT_LOGGING_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["PYTHONPATH"] = str(ROOT)
    if api_url:
        environment["PREFECT_API_URL"] = api_url
    return environment


def table_contents(lake: Path) -> dict[str, Any]:
    """Every committed part by path, without the columns that hold times."""
    contents = {}
    for manifest in sorted(lake.glob("tables/**/*.json")):
        part = manifest.with_suffix(".parquet")
        table = part.relative_to(lake).parts[1]
        rows = pq.read_table(part, partitioning=None)
        varying = [name for name in VARYING.get(table, []) if name in rows.column_names]
        contents[str(part.relative_to(lake))] = rows.drop_columns(varying).to_pylist()
    return contents


def file_hashes(lake: Path, *folders: str) -> dict[str, str]:
    """sha256 of every file below some folders of a lake."""
    return {
        str(path.relative_to(lake)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted((lake / folder).rglob("*"))
        if path.is_file()
    }


def stamps(lake: Path, *folders: str) -> dict[str, int]:
    """When each file below some folders was last written, in ns."""
    return {
        str(path.relative_to(lake)): path.stat().st_mtime_ns
        for folder in folders
        for path in sorted((lake / folder).rglob("*"))
        if path.is_file()
    }
