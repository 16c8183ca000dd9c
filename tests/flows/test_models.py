"""Models of a lake, loaded to be trained on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from cycle import FinishedCycle, copied

from flows import models
from flows.errors import SettingsError
from flows.session import Run
from flows.settings import parse_settings
from flows.steps import plans
from flows.steps import train as train_step
from flows.steps.train import fit
from storage import Lake, build_trainset, fingerprint_of


@pytest.fixture
def run(finished: FinishedCycle, tmp_path: Path) -> Run:
    cycle = copied(finished, tmp_path)
    return Run(Lake.open(str(cycle.lake)), parse_settings(cycle.settings), 1)


def test_load_copy_has_the_dropout_that_is_asked_for_and_the_same_weights(run: Run) -> None:
    ref = models.require(run, "filter", 1)
    kept, changed = models.load_copy(run, ref), models.load_copy(run, ref, dropout=0.37)
    assert changed.model.config.text.dropout == 0.37 != kept.model.config.text.dropout
    assert changed.model.text.layers[0].feed_forward.dropout == 0.37
    weights = changed.model.state_dict()
    assert all(torch.equal(weights[k], value) for k, value in kept.model.state_dict().items())


def test_finetuning_refuses_a_depth_that_its_start_does_not_have(run: Run, tmp_path: Path) -> None:
    settings = run.settings.with_changes({"model": {"text_depth": 1}})
    plan = plans.captioner(Run(run.lake, settings, 1))
    rows = build_trainset(run.lake, plan.sql, name="captioner")
    with pytest.raises(SettingsError, match=r"text_depth is 1, but the model to finetune has 2"):
        fit(Run(run.lake, settings, 1), plan, rows, tmp_path, print)


def test_processes_are_in_the_fingerprint_where_they_change_the_negatives(run: Run) -> None:
    def basis(processes: int, objectives: tuple[str, ...], negatives: str = "rank") -> str:
        changes = {"machine": {"train_processes": processes}}
        many = Run(run.lake, run.settings.with_changes(changes), 1)
        plan = dataclasses.replace(plans.pretrain(many), objectives=objectives)
        settings = plan.settings.model_copy(update={"negatives_from": negatives})
        plan = dataclasses.replace(plan, settings=settings)
        rows = build_trainset(run.lake, plan.sql, name="pretrain")
        return fingerprint_of(train_step._basis(many, plan, rows))

    assert basis(2, ("itc", "itm")) != basis(1, ("itc", "itm"))
    assert basis(2, ("itc", "itm"), "all_ranks") == basis(1, ("itc", "itm"), "all_ranks")
    assert basis(2, ("lm",)) == basis(1, ("lm",))
