"""Pairs held back from a training, and the training that they end."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cycle import tiny_settings
from pictures import ingest_noise

from blip_core import EvalTransform, TrainConfig, load_model
from flows.dev import DevSet, build_sets
from flows.errors import SettingsError
from flows.session import Run
from flows.settings import parse_settings, train_basis
from flows.steps.plan import TrainPlan, train_config
from flows.steps.plans import HUMAN_SQL
from flows.steps.train import train_model
from flows.train_section import TrainSettings
from storage import (
    Lake,
    StaleOutput,
    TrainSetRef,
    layout,
    local_folder,
    open_trainset,
    query,
)

EARLY = {"dev_share": 0.3, "evaluate_every_steps": 3, "patience": 2}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    ingest_noise(tmp_path, lake, 0, 20)
    settings = tiny_settings(tmp_path / "lake", tmp_path / "world")
    settings["model"] |= {"preset": "nano", "image_size_px": 32}
    settings["pretrain"] |= {"steps": 60, "log_every_steps": 3, "schedule": "constant"} | EARLY
    return Run(lake, parse_settings(settings), 0)


def _plan(run: Run, **changes: Any) -> TrainPlan:
    settings = run.settings.pretrain.model_copy(update=changes.pop("settings", {}))
    values = {"name": "pretrain", "role": "med", "round": 0, "sql": HUMAN_SQL}
    values |= {"objectives": ("lm",), "parent": None, "tokenizer_of": None}
    return TrainPlan(**{**values, "settings": settings, **changes})


def _pairs(run: Run, ref: TrainSetRef | None) -> set[tuple[str, str, str]]:
    assert ref is not None
    rows = open_trainset(run.lake, ref)
    found = (rows.row(i) for i in range(len(rows)))
    return {(row.image_id, row.caption, row.source) for row in found}


def _images(pairs: set[tuple[str, str, str]]) -> set[str]:
    return {image_id for image_id, _, _ in pairs}


def _metric(run: Run, name: str) -> dict[int, float]:
    rows = query(run.lake, f"SELECT n, value FROM metrics WHERE metric = '{name}'").to_pylist()
    return {row["n"]: row["value"] for row in rows}


def test_held_back_images_are_trained_on_by_none_of_their_texts(run: Run) -> None:
    web = f"SELECT image_id, 'seen on the web', 'web' FROM ({HUMAN_SQL}) GROUP BY image_id"
    train, dev = (
        _pairs(run, ref) for ref in build_sets(run, _plan(run, sql=f"{HUMAN_SQL} UNION ALL {web}"))
    )
    assert 2 <= len(_images(dev)) <= 12, "about .3 of 20"
    assert not _images(train) & _images(dev)
    assert len(_images(train) | _images(dev)) == 20
    assert {source for _, _, source in dev} == {"human"}
    assert {source for _, _, source in train} == {"human", "web"}


def test_what_is_held_back_does_not_change_when_other_images_come(run: Run, tmp_path: Path) -> None:
    before = _pairs(run, build_sets(run, _plan(run))[1])
    ingest_noise(tmp_path, run.lake, 20, 50)
    train, dev = (_pairs(run, ref) for ref in build_sets(run, _plan(run)))
    old = {pair for pair in train | dev if pair[0] not in _images(before)}
    assert before < dev
    assert not _images(before) & _images(train)
    assert len(_images(old)) == 50 - len(_images(before))
    more = _pairs(run, build_sets(run, _plan(run, settings={"dev_share": 0.45}))[1])
    assert dev < more, "a larger share holds back the same images and others"
    other = Run(run.lake, run.settings.with_changes({"seed": 1}), 0)
    assert _images(_pairs(run, build_sets(other, _plan(run))[1])) != _images(dev)


def test_training_stops_when_the_pairs_held_back_get_worse_and_keeps_the_best_model(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="flows"):
        ref, _ = train_model(run, _plan(run), lambda *_: None)
    curve = _metric(run, "dev_loss")
    best = min(curve, key=curve.__getitem__)
    assert list(curve) == list(range(3, best + 2 * 3 + 1, 3)), "two worse ones end it"
    assert max(curve) < 60
    assert _metric(run, "best_step") == {max(curve): best}
    assert _metric(run, "dev_loss_lm") == curve
    assert f"the model is that of step {best} of {max(curve)}" in caplog.text

    loaded = load_model(local_folder(run.lake, ref))
    _, dev = build_sets(run, _plan(run))
    assert dev is not None
    rows = open_trainset(run.lake, dev)
    held_back = DevSet(run, rows, EvalTransform(32), batch_size=12)
    config = TrainConfig(
        objectives=("lm",), steps=1, batch_size=12, label_smoothing=0.0, max_text_tokens=16
    )
    losses = held_back.losses(loaded.model, loaded.tokenizer, config)
    assert losses["dev_loss"] == pytest.approx(curve[best], rel=1e-6)


def test_two_processes_stop_where_one_does(run: Run, tmp_path: Path) -> None:
    train_model(run, _plan(run), lambda *_: None)
    alone = _metric(run, "dev_loss")
    (run.lake.root.local_path("tables") / "metrics").rename(tmp_path / "metrics-alone")
    machine = {"train_processes": 2, "train_sharding": "full"}
    two = Run(run.lake, run.settings.with_changes({"machine": machine}), 0)
    _, built = train_model(two, _plan(two), lambda *_: None)
    assert built
    assert _metric(two, "dev_loss") == pytest.approx(alone, rel=1e-3)


def test_what_is_held_back_is_part_of_what_a_model_was_made_from(run: Run, tmp_path: Path) -> None:
    few = {"steps": 3, "patience": None}
    ref, _ = train_model(run, _plan(run, settings=few), lambda *_: None)
    (row,) = query(run.lake, "SELECT config FROM models").to_pylist()
    config = json.loads(row["config"])
    assert config["train"]["dev_share"] == 0.3
    assert config["dev_set"] == build_sets(run, _plan(run))[1].fingerprint  # type: ignore[union-attr]
    assert train_model(run, _plan(run, settings=few), lambda *_: None) == (ref, False)
    with pytest.raises(StaleOutput, match="dev_share"):
        train_model(run, _plan(run, settings=few | {"dev_share": 0.2}), lambda *_: None)


def test_held_back_pairs_of_frozen_vision_are_encoded_once(run: Run) -> None:
    frozen = {"freeze": ("vision",), "cache_vision": True, "augment": "none", "steps": 6}
    train_model(run, _plan(run, settings=frozen), lambda *_: None)
    cached = _metric(run, "dev_loss")
    assert list(cached) == [3, 6]
    plain = _plan(run, settings=frozen | {"cache_vision": False}, round=1)
    train_model(run, plain, lambda *_: None)
    rows = query(
        run.lake, "SELECT n, value FROM metrics WHERE metric = 'dev_loss' AND round = 1"
    ).to_pylist()
    assert {row["n"]: row["value"] for row in rows} == pytest.approx(cached, rel=1e-5)


def test_held_back_image_that_cannot_be_decoded_is_left_out(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    _, dev = build_sets(run, _plan(run))
    assert dev is not None
    rows = open_trainset(run.lake, dev)
    row = rows.row(0)
    shard = run.lake.root.local_path(layout.shard(row.shard))
    assert shard is not None
    data = bytearray(shard.read_bytes())
    data[row.offset : row.offset + row.size] = bytes(row.size)
    shard.write_bytes(bytes(data))
    batches = list(DevSet(run, rows, EvalTransform(32), batch_size=3).batches())
    seen = [image_id for batch in batches for image_id in batch.image_ids]
    assert sorted(seen) == sorted(
        rows.row(i).image_id for i in range(len(rows)) if rows.row(i).image_id != row.image_id
    )
    assert f"image {row.image_id} of shard {row.shard} left out" in caplog.text


def test_batches_held_back_are_the_same_each_time_and_mix_images(run: Run) -> None:
    _, dev = build_sets(run, _plan(run))
    assert dev is not None
    held_back = DevSet(run, open_trainset(run.lake, dev), EvalTransform(32), batch_size=3)
    first, second = list(held_back.batches()), list(held_back.batches())
    assert [batch.captions for batch in first] == [batch.captions for batch in second]
    assert all(
        torch.equal(one.pixel_values, other.pixel_values)
        for one, other in zip(first, second, strict=True)
    )
    ids = [image_id for batch in first for image_id in batch.image_ids]
    assert len(ids) == len(open_trainset(run.lake, dev))
    assert ids != sorted(ids), "texts of an image do not lie side by side"


def test_share_that_holds_nothing_back_is_refused(run: Run) -> None:
    plan = _plan(run, settings={"dev_share": 1e-6})
    with pytest.raises(SettingsError, match=r"pretrain.dev_share 1e-06 holds back no human image"):
        train_model(run, plan, lambda *_: None)


def test_one_part_of_the_loss_may_decide_if_it_is_trained(run: Run) -> None:
    plan = _plan(run, objectives=("itc", "itm"), settings={"best_metric": "dev_loss_itm"})
    assert train_config(plan, 0, 100).best_metric == "dev_loss_itm"
    none = {"dev_share": 0.0, "evaluate_every_steps": None, "patience": None}
    assert train_config(_plan(run, settings=none), 0, 100).best_metric is None
    plan = _plan(run, settings={"best_metric": "dev_loss_itm"})
    said = "pretrain.best_metric is dev_loss_itm, but this training has dev_loss, dev_loss_lm"
    with pytest.raises(SettingsError, match=said):
        train_model(run, plan, lambda *_: None)
    assert not list(run.lake.scratch("train").iterdir())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dev_share": 0.1}, "dev_share 0.1 holds pairs back .* give evaluate_every_steps"),
        ({"evaluate_every_steps": 5}, "need pairs that are not trained on: give dev_share"),
        ({"patience": 5}, "need pairs that are not trained on: give dev_share"),
        ({"dev_share": 0.6, "evaluate_every_steps": 5}, "less than or equal to 0.5"),
    ],
)
def test_settings_that_evaluate_on_nothing_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_settings({"preset": None, "captioner": {"queue_size": 0, **fields}})


def test_holding_nothing_back_leaves_old_fingerprints_valid() -> None:
    assert not {"dev_share", "evaluate_every_steps", "patience"} & set(train_basis(TrainSettings()))
    shown = train_basis(TrainSettings(**EARLY))  # type: ignore[arg-type]
    assert {name: shown[name] for name in EARLY} == EARLY
