"""Curves reach TensorBoard always, and Weights & Biases only when it is set up."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows.boards import WANDB_SETTINGS, Boards


@pytest.fixture(autouse=True)
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in WANDB_SETTINGS:
        monkeypatch.delenv(variable, raising=False)


def _drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}


def test_boards_draw_what_is_known_in_tensorboard(tmp_path: Path) -> None:
    with Boards(tmp_path, "pretrain", {"steps": 4}) as boards:
        boards.log({"loss": 2.5, "loss_itm": None}, 10)
        boards.log({"loss": 1.5, "loss_itm": 0.5}, 20)
    assert _drawn(tmp_path) == {"loss": [(10, 2.5), (20, 1.5)], "loss_itm": [(20, 0.5)]}
    assert not (tmp_path / "wandb").exists(), "nothing is told to others unasked"


def test_boards_draw_in_wandb_when_it_is_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Boards(tmp_path, "pretrain-abc", {"steps": 4}) as boards:
        boards.log({"loss": 2.5}, 10)
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-pretrain-abc.wandb")
    for _ in range(100):  # its own process writes the last of it
        if b"loss" in record.read_bytes():
            break
        time.sleep(0.1)
    assert b"loss" in record.read_bytes()
    assert _drawn(tmp_path) == {"loss": [(10, 2.5)]}
