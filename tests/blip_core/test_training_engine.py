"""Accumulation, memory, compilation, best models and early stopping; what one step does is in test_training."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from blip_core import (
    MED,
    Batch,
    ConfigError,
    MEDConfig,
    MEDTokenizer,
    TrainConfig,
    TrainingError,
    build_model,
    train,
)

Source = Callable[[int], Batch]
Start = Callable[[], MED]


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


@pytest.fixture
def start(config: MEDConfig) -> Start:
    """Build the same model each time, without dropout."""
    text = dataclasses.replace(config.text, dropout=0.0)
    return lambda: build_model(dataclasses.replace(config, text=text), seed=0)


@pytest.fixture
def batches(pixel_values: Tensor, texts: list[str]) -> Source:
    lengths = ["", " and a picture of two", " of a"]

    def source(number: int) -> Batch:
        rows = np.random.default_rng(number).permutation(16)[:4]
        captions = [texts[row] + lengths[(row + number) % 3] for row in rows]
        return Batch(
            pixel_values=pixel_values[rows],
            captions=captions,
            image_ids=[str(row) for row in rows],
        )

    return source


def _config(**changes: object) -> TrainConfig:
    values = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "queue_size": 16}
    return TrainConfig(**{**values, "checkpoint_every_steps": 2, "log_every_steps": 1, **changes})


def _joined(source: Source, number: int, count: int) -> Batch:
    parts = [source(number * count + index) for index in range(count)]
    return Batch(
        pixel_values=torch.cat([part.pixel_values for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        image_ids=[image_id for part in parts for image_id in part.image_ids],
    )


def _same(first: MED, second: MED) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_accumulated_lm_steps_are_those_of_one_large_batch(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    lm = {"objectives": ("lm",), "prompt": "a picture of "}
    large, parts = start(), start()
    whole = train(
        large,
        tokenizer,
        lambda step: _joined(batches, step, 3),
        _config(batch_size=12, **lm),
        tmp_path / "large",
    )
    split = train(parts, tokenizer, batches, _config(accumulate_steps=3, **lm), tmp_path / "parts")
    for line, other in zip(whole.history, split.history, strict=True):
        assert line["loss_lm"] == pytest.approx(other["loss_lm"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_accumulation_reads_every_batch_once_and_fills_the_queue_with_all(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    asked = []

    def source(number: int) -> Batch:
        asked.append(number)
        return batches(number)

    train(start(), tokenizer, source, _config(accumulate_steps=2), tmp_path)
    assert asked == list(range(8))
    from safetensors.torch import load_file

    queue = load_file(str(tmp_path / "step-000002" / "momentum.safetensors"))
    assert int(queue["queue.num_valid"]) == 16, "two steps of two micro-batches of four"
    state = json.loads((tmp_path / "step-000002" / "state.json").read_text())
    assert (state["step"], state["num_batches"]) == (2, 4)


def test_accumulating_run_resumed_after_a_kill_equals_an_undisturbed_one(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    config, whole, resumed = _config(accumulate_steps=2), start(), start()
    train(whole, tokenizer, batches, config, tmp_path / "whole")

    def dies(number: int) -> Batch:
        if number == 7:
            raise Killed
        return batches(number)

    with pytest.raises(Killed):
        train(start(), tokenizer, dies, config, tmp_path / "killed")
    assert train(resumed, tokenizer, batches, config, tmp_path / "killed").resumed_from == 2
    assert _same(whole, resumed)


def test_checkpointed_blocks_compute_again_and_change_no_bit(
    config: MEDConfig, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    vision = dataclasses.replace(config.vision, drop_path=0.3)
    models = [build_model(dataclasses.replace(config, vision=vision), seed=0) for _ in range(2)]
    calls = {0: 0, 1: 0}
    for key, model in enumerate(models):

        def count(*_: object, key: int = key) -> None:
            calls[key] += torch.is_grad_enabled()

        for block in model.vision.blocks:
            block.attn.qkv.register_forward_hook(count)
    for key, model in enumerate(models):
        wanted = _config(checkpoint_blocks=key, objectives=("itm", "lm"))
        train(model, tokenizer, batches, wanted, tmp_path / str(key))
    assert calls == {0: 8, 1: 12}, "the last of two blocks twice a step"
    assert _same(*models)
    assert all("forward" not in vars(block) for block in models[1].vision.blocks)


def test_checkpoint_blocks_may_change_when_a_run_goes_on(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    train(start(), tokenizer, batches, _config(), tmp_path)
    again = train(start(), tokenizer, batches, _config(checkpoint_blocks=2), tmp_path)
    assert again.resumed_from == 4
    with pytest.raises(ConfigError, match="checkpoint_blocks is 3, but the vision encoder has 2"):
        train(start(), tokenizer, batches, _config(checkpoint_blocks=3), tmp_path / "other")


def test_train_goes_on_with_a_folder_that_an_older_version_made(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    whole, resumed = start(), start()
    train(whole, tokenizer, batches, _config(), tmp_path)
    old = {"steps", "batch_size", "learning_rate", "objectives", "queue_size", "seed", "schedule"}
    settings = json.loads((tmp_path / "run.json").read_text())
    settings["train"] = {k: v for k, v in settings["train"].items() if k in old}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    for path in (tmp_path / "step-000004").iterdir():
        path.unlink()
    (tmp_path / "step-000004").rmdir()
    path = tmp_path / "step-000002" / "state.json"
    names = {"step", "num_skipped", "num_skipped_in_a_row", "files"}
    state = {k: v for k, v in json.loads(path.read_text()).items() if k in names}
    path.write_text(json.dumps(state | {"window": {}}))
    assert train(resumed, tokenizer, batches, _config(), tmp_path).resumed_from == 2
    assert _same(whole, resumed)
    with pytest.raises(ConfigError, match="accumulate_steps 1 -> 2"):
        train(start(), tokenizer, batches, _config(accumulate_steps=2), tmp_path)


def test_train_keeps_as_many_checkpoints_as_asked(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    train(start(), tokenizer, batches, _config(steps=8, keep_checkpoints=3), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-000004",
        "step-000006",
        "step-000008",
    ]


def _judge(values: Mapping[int, float], seen: dict[int, dict[str, Tensor]]) -> Callable:
    def evaluate(model: MED, step: int) -> dict[str, float]:
        assert not model.training
        seen[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(step)  # draws of an evaluation must not reach the training
        return {"dev_loss": values[step], "other": 1.0}

    return evaluate


def test_train_stops_early_and_ends_with_the_best_model(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    values = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.1, 5: 0.1}
    seen: dict[int, dict[str, Tensor]] = {}
    config = _config(steps=9, evaluate_every_steps=1, best_metric="dev_loss", patience=2)
    model = start()
    judge = _judge(values, seen)
    result = train(model, tokenizer, batches, config, tmp_path, evaluate=judge)
    assert (result.steps, result.best_step, result.best_value) == (4, 2, 2.0)
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in model.state_dict().items())
    evaluated = [line for line in result.history if "dev_loss" in line]
    assert evaluated == [{"step": s, "dev_loss": values[s], "other": 1.0} for s in range(1, 5)]
    assert result.final["step"] == 4
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-000002"]

    def refuses(number: int) -> Batch:
        raise AssertionError(f"batch {number} was asked for")

    again = start()
    ended = train(again, tokenizer, refuses, config, tmp_path, evaluate=judge)
    assert (ended.steps, ended.best_step) == (4, 2)
    assert _same(model, again)


def test_train_killed_after_a_best_model_ends_with_the_same_one(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    values = {step: abs(step - 5.0) for step in range(1, 9)}
    config = _config(
        steps=8, evaluate_every_steps=1, best_metric="dev_loss", checkpoint_every_steps=3
    )

    def dies(number: int) -> Batch:
        if number == 5:
            raise Killed
        return batches(number)

    whole, resumed = start(), start()
    judge = _judge(values, {})
    train(whole, tokenizer, batches, config, tmp_path / "whole", evaluate=judge)
    with pytest.raises(Killed):
        train(start(), tokenizer, dies, config, tmp_path / "killed", evaluate=judge)
    result = train(resumed, tokenizer, batches, config, tmp_path / "killed", evaluate=judge)
    assert (result.resumed_from, result.best_step) == (3, 5)
    assert _same(whole, resumed)


def test_train_with_evaluations_trains_the_same_weights(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    plain, judged = start(), start()
    train(plain, tokenizer, batches, _config(), tmp_path / "plain")
    config = _config(evaluate_every_steps=1, best_metric="dev_loss", best_mode="max")
    judge = _judge({step: float(step) for step in range(1, 5)}, {})
    result = train(judged, tokenizer, batches, config, tmp_path / "judged", evaluate=judge)
    assert result.best_step == 4
    assert _same(plain, judged)


def test_train_refuses_an_evaluation_without_the_metric_and_half_a_pair(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    config = _config(best_metric="dev_los")
    judge = _judge({4: 1.0}, {})
    with pytest.raises(ConfigError, match=r"'dev_los' is not in what evaluate gave: \['dev_loss'"):
        train(start(), tokenizer, batches, config, tmp_path / "typo", evaluate=judge)
    with pytest.raises(ConfigError, match="both or neither"):
        train(start(), tokenizer, batches, config, tmp_path / "half")


def test_train_stopped_by_broken_steps_is_back_at_its_last_good_checkpoint(
    start: Start,
    tokenizer: MEDTokenizer,
    batches: Source,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, model = start(), start()
    train(good, tokenizer, batches, _config(schedule="constant"), tmp_path / "good")
    done = {"broken": False}

    def breaks(number: int) -> Batch:
        if number >= 5:  # the weights, not the batch: no later step can be sound
            with torch.no_grad():
                model.text_proj.bias.fill_(float("nan"))
            done["broken"] = True
        return batches(number)

    config = _config(steps=20, schedule="constant", max_skipped_in_a_row=4)
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="back at step 4"):
        train(model, tokenizer, breaks, config, tmp_path / "broken")
    assert done["broken"]
    assert _same(good, model)
    assert "no checkpoint is written" in caplog.text
    names = sorted(path.name for path in (tmp_path / "broken").glob("step-*"))
    assert names == ["step-000002", "step-000004"]


def test_weight_decay_on_everything_moves_what_gets_no_gradient_signal(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    norms = {}
    for scope in ("matrices", "all"):
        model = start()
        config = _config(weight_decay=20.0, weight_decay_on=scope, learning_rate=1e-2)
        train(model, tokenizer, batches, config, tmp_path / scope)
        norms[scope] = float(model.text.embedding_norm.weight.detach().norm())
    assert norms["all"] < 0.9 * norms["matrices"]


def test_train_refuses_a_queue_smaller_than_a_step(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    config = _config(queue_size=16, accumulate_steps=5)
    with pytest.raises(ConfigError, match="queue_size 16 is smaller than the 20 pairs of one step"):
        train(start(), tokenizer, batches, config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate_steps": 0}, "accumulate_steps must be above 0, got 0"),
        ({"weight_decay_on": "none"}, "weight_decay_on must be matrices or all, got 'none'"),
        ({"teacher_mode": "test"}, "teacher_mode must be eval or train, got 'test'"),
        ({"schedule": "epoch_decay"}, "epoch_decay needs steps_per_epoch"),
        ({"decay_rate": 0.0}, r"decay_rate must be in \(0, 1\], got 0.0"),
        ({"patience": 2}, "need best_metric"),
        ({"checkpoint_blocks": -1}, "checkpoint_blocks must be 0 or more, got -1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be above 0, got 0"),
    ],
)
def test_engine_settings_name_field_value_and_bound(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**change)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_what_plain_ones_do_and_are_plain_afterwards(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    compiled = []

    def watches(number: int) -> Batch:
        compiled.append(model.vision.blocks[0]._compiled_call_impl is not None)
        return batches(number)

    model, plain = start(), start()
    config = _config(steps=2, checkpoint_blocks=1)
    result = train(
        model, tokenizer, watches, dataclasses.replace(config, compile=True), tmp_path / "compiled"
    )
    expected = train(plain, tokenizer, batches, config, tmp_path / "plain")
    assert result.final["loss"] == pytest.approx(expected.final["loss"], rel=1e-4)
    assert all(compiled)
    assert model.vision.blocks[0]._compiled_call_impl is None


@pytest.mark.parametrize("change", [{"hard_negatives_ramp_steps": 100}, {"fresh_lr_scale": 10.0}])
def test_settings_for_short_runs_reach_the_step(
    start: Start,
    tokenizer: MEDTokenizer,
    batches: Source,
    tmp_path: Path,
    change: dict[str, float],
) -> None:
    plain, changed = start(), start()
    train(plain, tokenizer, batches, _config(), tmp_path / "plain")
    train(changed, tokenizer, batches, _config(**change), tmp_path / "changed")
    assert not _same(plain, changed)


def test_fresh_parts_move_more_where_their_rate_is_scaled(
    start: Start, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    def moved(scale: float) -> dict[str, float]:
        before, model = start().state_dict(), start()
        config = _config(steps=1, fresh_lr_scale=scale, grad_clip_norm=None, weight_decay=0.0)
        train(model, tokenizer, batches, config, tmp_path / str(scale))
        return {k: float((v - before[k]).norm()) for k, v in model.state_dict().items()}

    once, tenfold = moved(1.0), moved(10.0)
    assert tenfold["itm_head.weight"] == pytest.approx(10 * once["itm_head.weight"], rel=1e-2)
    name = "text.layers.0.feed_forward.output.weight"
    assert tenfold[name] == pytest.approx(once[name], rel=1e-2)
