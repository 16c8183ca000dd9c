"""A failure costs one row; a device that is broken costs the run, never a table of failed rows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cycle import FinishedCycle, copied

from flows import models
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.batches import isolate
from flows.steps.curate_shards import caption_shard, score_shard
from flows.steps.shards import web_parts
from storage import Lake, list_parts

WIDTH = 4
Step = Callable[..., object]
GOOD, POISON = torch.ones(WIDTH), torch.ones(WIDTH + 1)


def _norms(rows: list[torch.Tensor]) -> list[float]:
    """Real work on a batch: rows of another width cannot be stacked."""
    return [float(norm) for norm in torch.stack(rows).norm(dim=1)]


@pytest.mark.parametrize("place", [0, 3, 6])
def test_isolate_gives_the_failing_item_its_error_and_the_others_their_results(place: int) -> None:
    def work(rows: list[torch.Tensor]) -> list[float]:
        return _norms([*rows, GOOD])[:-1]

    rows = [GOOD] * 7
    rows[place] = POISON
    results = isolate(work, rows)
    assert isinstance(results.pop(place), RuntimeError)
    assert results == [2.0] * 6


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, ValueError])
def test_isolate_halves_a_batch_that_is_too_large(error: type[Exception]) -> None:
    sizes = []

    def work(rows: list[int]) -> list[int]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise error("too much at once")
        return [row * 10 for row in rows]

    assert isolate(work, [1, 2, 3, 4, 5]) == [10, 20, 30, 40, 50]
    assert sizes == [5, 2, 3, 1, 2]


def test_isolate_raises_at_once_when_the_device_is_broken() -> None:
    tried = []

    def work(rows: list[int]) -> list[int]:
        tried.append(len(rows))
        if 3 in rows:
            raise torch.AcceleratorError("device-side assert triggered")
        return rows

    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        isolate(work, [1, 2, 3, 4])
    assert tried == [4], "a broken device was asked again"


def test_isolate_raises_when_nothing_of_a_batch_succeeds() -> None:
    with pytest.raises(RuntimeError, match="stack"):
        isolate(lambda rows: _norms([*rows, GOOD]), [POISON] * 3)


def test_isolate_keeps_the_error_of_a_batch_of_one() -> None:
    (result,) = isolate(lambda rows: _norms([*rows, GOOD]), [POISON])
    assert isinstance(result, RuntimeError)
    assert isolate(_norms, []) == []


@pytest.mark.parametrize(
    ("step", "role", "table"),
    [(caption_shard, "captioner", "captions"), (score_shard, "filter", "scores")],
    ids=["caption", "score"],
)
def test_stage_on_a_device_that_cannot_compute_is_raised_and_commits_no_rows(
    finished: FinishedCycle, tmp_path: Path, step: Step, role: str, table: str
) -> None:
    cycle = copied(finished, tmp_path)
    lake = Lake.open(str(cycle.lake))
    before = list_parts(lake, table)
    machine = cycle.settings["machine"] | {"device": "meta", "on_stale": "rebuild"}
    changed = {"machine": machine, "seed": 1, "score": {"max_text_tokens": 12}}
    run = Run(lake, parse_settings(cycle.settings | changed), 1)
    shard, model = web_parts(run)[0], models.require(run, role, 1)
    with pytest.raises(RuntimeError, match="meta"):
        step(run, shard, model, lambda images: None)
    assert list_parts(lake, table) == before
