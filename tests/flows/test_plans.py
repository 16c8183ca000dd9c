"""What the trainings of a cycle are made of, as the settings say."""

from pathlib import Path
from typing import Any

import pytest
from cycle import tiny_settings
from pictures import ingest_noise

from flows import models
from flows.errors import SettingsError
from flows.session import Run
from flows.settings import BootstrapSettings, parse_settings
from flows.steps import plans
from flows.steps import train as train_step
from flows.steps.plan import TrainPlan
from flows.steps.train import train_model
from storage import Lake, ModelRef, QueryRefused, open_trainset, query

MINE = "SELECT image_id, upper(caption) AS caption, source FROM human WHERE caption LIKE '%red%' -- mine"


def _settings(folder: Path, **sections: Any) -> BootstrapSettings:
    values = tiny_settings(folder / "lake", folder / "world")
    for name, changes in sections.items():
        values[name] = values.get(name, values["pretrain"]) | changes
    return parse_settings(values)


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the plan of a stage; a round with decisions and a champion is taken for granted."""
    champion = ModelRef(model_id="0" * 32, role="med", round=0, path="models/none")
    monkeypatch.setattr(models, "starting_model", lambda run: champion)
    monkeypatch.setattr(plans, "list_parts", lambda *_: ["one"])
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    makers = {"pretrain": plans.pretrain, "captioner": plans.captioner}
    makers |= {"filter": plans.filter_, "retrain": plans.retrain}

    def make(stage: str, **sections: Any) -> TrainPlan:
        return makers[stage](Run(lake, _settings(tmp_path, **sections), 1))

    return make


@pytest.mark.parametrize("stage", ["pretrain", "captioner", "filter", "retrain"])
def test_a_query_of_the_settings_takes_the_place_of_a_stages_rows(stage: str, plan_of: Any) -> None:
    assert plan_of(stage, **{stage: {"sql": MINE}}).sql == MINE
    assert plan_of(stage).sql != MINE


def test_retraining_by_the_settings_of_pretraining_still_reads_the_clean_set(plan_of: Any) -> None:
    plan = plan_of("retrain", pretrain={"sql": MINE, "steps": 7})
    assert plan.settings.steps == 7
    assert plan.sql == plans.clean_sql(1)
    assert plan.settings.sql is None


def test_a_model_is_trained_on_the_rows_of_a_query(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    ingest_noise(tmp_path, lake, 0, 24)
    early = {"dev_share": 0.3, "evaluate_every_steps": 5}
    settings = _settings(tmp_path, pretrain={"sql": f"{MINE}\n;", "batch_size": 4} | early)
    run = Run(lake, settings, 0)
    seen = []
    build = train_step.build_sets

    def spy(*args: Any) -> Any:
        seen.append(build(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "build_sets", spy)
        train_model(run, plans.pretrain(run), lambda *_: None)
    ((ref, dev),) = seen
    assert dev is not None
    rows = open_trainset(lake, ref)
    captions = {rows.row(i).caption for i in range(len(rows))}
    assert captions
    assert all("RED" in caption for caption in captions)
    (model,) = query(lake, "SELECT trained_on FROM models").to_pylist()
    assert model["trained_on"] == ref.fingerprint


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT image_id, caption FROM human", 'pretrain: the query failed: .*"source"'),
        ("SELECT * FROM humans", "pretrain: the query failed: .*humans"),
        ("DELETE FROM human", "refused"),
    ],
)
def test_a_query_that_gives_no_training_set_is_refused_before_any_compute(
    sql: str, said: str, tmp_path: Path
) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    ingest_noise(tmp_path, lake, 0, 4)
    run = Run(lake, _settings(tmp_path, pretrain={"sql": sql}), 0)
    with pytest.raises(QueryRefused, match=said):
        train_model(run, plans.pretrain(run), lambda *_: None)
    assert not list(lake.scratch("train").iterdir())


def test_an_empty_query_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"pretrain.sql: .*sql is empty"):
        _settings(tmp_path, pretrain={"sql": " ; "})


def test_crops_and_words_of_sides_are_as_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def transform(*_: object, **options: object) -> None:
        raise Seen(f"{options['min_crop_area']} {options['swap_sides']}")

    lake = Lake.open(str(tmp_path / "lake"), create=True)
    ingest_noise(tmp_path, lake, 0, 4)
    monkeypatch.setattr(train_step, "TrainTransform", transform)
    for changes, said in (
        ({}, "0.2 True"),
        ({"min_crop_area": 0.5, "swap_sides": False}, "0.5 False"),
    ):
        run = Run(lake, _settings(tmp_path, pretrain=changes), 0)
        with pytest.raises(Seen, match=said):
            train_model(run, plans.pretrain(run), lambda *_: None)
