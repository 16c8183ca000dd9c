import dataclasses
import json
import logging
from collections.abc import Callable
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
    TrainLog,
    build_model,
    train,
)
from blip_core.watch import NOT_REPEATABLE

Source = Callable[[int], Batch]


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


@pytest.fixture
def start(config: MEDConfig) -> Callable[[], MED]:
    """Build the same model each time, with dropout so that random draws matter."""
    text = dataclasses.replace(config.text, dropout=0.1)
    return lambda: build_model(dataclasses.replace(config, text=text), seed=0)


@pytest.fixture
def batches(pixel_values: Tensor, texts: list[str]) -> Source:
    def source(step: int) -> Batch:
        rows = np.random.default_rng(step).integers(0, 16, 6)
        return Batch(
            pixel_values=pixel_values[rows],
            captions=[texts[row] for row in rows],
            image_ids=[str(row) for row in rows],
        )

    return source


def _config(**changes: object) -> TrainConfig:
    values = {
        "steps": 9,
        "batch_size": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "queue_size": 16,
        "checkpoint_every_steps": 3,
        "log_every_steps": 2,
    }
    return TrainConfig(**values | changes)


def _weights(model: MED) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def _without_speed(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in NOT_REPEATABLE} for line in history]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_resumed_after_a_kill_equals_an_undisturbed_run_bit_for_bit(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path, dtype: str
) -> None:
    config = _config(dtype=dtype)
    whole = start()
    undisturbed = train(whole, tokenizer, batches, config, tmp_path / "whole")
    assert undisturbed.resumed_from == 0

    def dies_at_7(step: int) -> Batch:
        if step == 7:
            raise Killed
        return batches(step)

    killed = start()
    with pytest.raises(Killed):
        train(killed, tokenizer, dies_at_7, config, tmp_path / "killed")
    resumed = start()
    result = train(resumed, tokenizer, batches, config, tmp_path / "killed")
    assert result.resumed_from == 6
    assert _same(_weights(whole), _weights(resumed))
    assert _without_speed(result.history) == _without_speed(undisturbed.history)
    assert [line["step"] for line in result.history] == [2, 4, 6, 8, 9]
    assert not _same(_weights(whole), _weights(start())), "training changed the weights"


def test_train_on_a_finished_folder_loads_it_and_does_no_step(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    first, second = start(), start()
    train(first, tokenizer, batches, _config(), tmp_path)

    def refuses(step: int) -> Batch:
        raise AssertionError(f"step {step} was asked for")

    result = train(second, tokenizer, refuses, _config(), tmp_path)
    assert result.resumed_from == 9
    assert _same(_weights(first), _weights(second))
    assert not second.training


def test_train_keeps_the_last_two_checkpoints_and_no_leftovers(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    (tmp_path / "_tmp-step-000003").mkdir(parents=True)
    train(start(), tokenizer, batches, _config(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["history.jsonl", "run.json", "step-000006", "step-000009"]
    files = sorted(path.name for path in (tmp_path / "step-000009").iterdir())
    assert files == [f"{n}.safetensors" for n in ("model", "momentum", "optimizer")] + [
        "state.json"
    ]


@pytest.mark.parametrize("damage", ["flipped", "cut", "absent", "state"])
def test_train_names_a_corrupt_checkpoint_sets_it_aside_and_uses_the_one_before(
    start: Callable[[], MED],
    tokenizer: MEDTokenizer,
    batches: Source,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    whole = start()
    train(whole, tokenizer, batches, _config(), tmp_path)
    newest = tmp_path / "step-000009"
    path = newest / ("state.json" if damage == "state" else "optimizer.safetensors")
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2])
    again = start()
    with caplog.at_level(logging.WARNING):
        result = train(again, tokenizer, batches, _config(), tmp_path)
    assert result.resumed_from == 6
    assert (tmp_path / "corrupt-step-000009").is_dir()
    assert "step-000009" in caplog.text
    assert "set aside" in caplog.text
    assert _same(_weights(whole), _weights(again))


def test_train_refuses_a_folder_of_another_configuration_naming_the_field(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    train(start(), tokenizer, batches, _config(), tmp_path)
    with pytest.raises(ConfigError, match=r"train.learning_rate 0.001 -> 0.002"):
        train(start(), tokenizer, batches, _config(learning_rate=2e-3), tmp_path)
    other_start = start()
    with torch.no_grad():
        other_start.logit_scale.add_(1e-3)
    with pytest.raises(ConfigError, match="initial_weights"):
        train(other_start, tokenizer, batches, _config(), tmp_path)
    result = train(start(), tokenizer, batches, _config(log_every_steps=5), tmp_path)
    assert result.resumed_from == 9, "how often to log is no other run"


def test_train_gives_every_trained_parameter_a_step(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    before, model = _weights(start()), start()
    train(model, tokenizer, batches, _config(steps=3, min_learning_rate=1e-3), tmp_path)
    unmoved = {name for name, value in _weights(model).items() if torch.equal(value, before[name])}
    assert unmoved == set()


@pytest.mark.parametrize(
    ("objectives", "logged"),
    [
        (("lm",), {"loss_lm"}),
        (("itm",), {"loss_itm", "itm_accuracy"}),
        (("itc",), {"loss_itc"}),
        (("itc", "itm"), {"loss_itc", "loss_itm", "itm_accuracy"}),
    ],
)
def test_train_does_the_objectives_asked_for_and_no_other(
    start: Callable[[], MED],
    tokenizer: MEDTokenizer,
    batches: Source,
    tmp_path: Path,
    objectives: tuple[str, ...],
    logged: set[str],
) -> None:
    model, logs = start(), list[TrainLog]()
    train(
        model,
        tokenizer,
        batches,
        _config(objectives=objectives, steps=2),
        tmp_path,
        on_log=logs.append,
    )
    values = dataclasses.asdict(logs[-1])
    optional = {"loss_itc", "loss_itm", "loss_lm", "itm_accuracy"}
    assert {name for name in optional if values[name] is not None} == logged
    losses = [values[name] for name in logged if name.startswith("loss_")]
    assert values["loss"] == pytest.approx(sum(losses), rel=1e-5)


def test_history_says_how_matching_and_features_are_doing(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    config = _config(steps=3, log_every_steps=1, momentum=0.5, peak_flops=1e12)
    for line in train(start(), tokenizer, batches, config, tmp_path).history:
        right, wrong = line["itm_accuracy_positive"], line["itm_accuracy_negative"]
        low, high = sorted((right, wrong))
        assert low <= line["itm_accuracy"] <= high
        assert -1.0 < line["image_cosine"] < 1.0
        assert -1.0 < line["text_cosine"] < 1.0
        assert 0.5 < line["queue_alignment"] < 1.0, "the teacher is near, and not the same"
        assert line["memory_gib"] > 0
        assert line["mfu"] > 0
    lm = train(start(), tokenizer, batches, _config(steps=2, objectives=("lm",)), tmp_path / "lm")
    unknown = ("itm_accuracy_positive", "image_cosine", "queue_alignment", "mfu")
    assert [lm.final[name] for name in unknown] == [None] * 4


def test_collapsed_features_are_named_in_the_result(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    def one_picture(step: int) -> Batch:
        batch = batches(step)
        return dataclasses.replace(batch, pixel_values=batch.pixel_values[:1].expand(6, -1, -1, -1))

    result = train(start(), tokenizer, one_picture, _config(steps=5, log_every_steps=1), tmp_path)
    assert [(each.name, each.step) for each in result.warned] == [("collapsed_features", 5)]


@pytest.mark.parametrize("prefix", ["vision", "vision."])
def test_train_leaves_frozen_parameters_alone_and_thaws_them_afterwards(
    start: Callable[[], MED],
    tokenizer: MEDTokenizer,
    batches: Source,
    tmp_path: Path,
    prefix: str,
) -> None:
    before, model = _weights(start()), start()
    train(model, tokenizer, batches, _config(steps=2, freeze=(prefix,)), tmp_path / "frozen")
    moved = {
        name for name, value in _weights(model).items() if not torch.equal(value, before[name])
    }
    assert not any(name.startswith("vision.") for name in moved)
    assert "vision_proj.weight" in moved
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="no parameter's name starts with 'visoin'"):
        train(start(), tokenizer, batches, _config(freeze=("visoin",)), tmp_path / "typo")


def test_train_copes_with_a_batch_of_one_and_with_equal_texts(
    start: Callable[[], MED], tokenizer: MEDTokenizer, pixel_values: Tensor, tmp_path: Path
) -> None:
    def lonely(step: int) -> Batch:
        count = 1 if step % 2 else 3
        return Batch(
            pixel_values=pixel_values[:count],
            captions=["a red ring"] * count,
            image_ids=[str(i) for i in range(count)],
        )

    result = train(start(), tokenizer, lonely, _config(steps=4, batch_size=3), tmp_path)
    assert result.num_skipped == 0
    assert all(np.isfinite(line["loss"]) for line in result.history)


def test_train_skips_a_broken_batch_and_ends_when_all_are(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    def poisoned(step: int, bad: range) -> Batch:
        batch = batches(step)
        if step in bad:
            batch = dataclasses.replace(batch, pixel_values=batch.pixel_values * float("nan"))
        return batch

    model = start()
    once = train(model, tokenizer, lambda s: poisoned(s, range(4, 5)), _config(), tmp_path / "once")
    assert once.num_skipped == 1
    assert [(each.name, each.step) for each in once.warned] == [("not_finite", 5)]
    assert "lower learning_rate" in once.warned[0].message.lower()
    assert {"step": 5, "not_finite": 1.0} in once.history
    assert all(torch.isfinite(value).all() for value in _weights(model).values())
    with pytest.raises(TrainingError, match=r"not finite since step 4, 11 steps in a row"):
        train(
            start(),
            tokenizer,
            lambda s: poisoned(s, range(4, 99)),
            _config(steps=50),
            tmp_path / "always",
        )


def test_train_learns_to_match_and_to_caption(
    config: MEDConfig,
    tokenizer: MEDTokenizer,
    pixel_values: Tensor,
    texts: list[str],
    tmp_path: Path,
) -> None:
    def all_pairs(step: int) -> Batch:
        return Batch(
            pixel_values=pixel_values,
            captions=texts,
            image_ids=[str(index) for index in range(16)],
        )

    wanted = _config(
        steps=120, batch_size=16, learning_rate=3e-3, label_smoothing=0.0, log_every_steps=20
    )
    text = dataclasses.replace(config.text, dropout=0.0)
    model = build_model(dataclasses.replace(config, text=text), seed=0)
    history = train(model, tokenizer, all_pairs, wanted, tmp_path).history
    assert history[-1]["loss_lm"] < 0.3 * history[0]["loss_lm"]
    assert history[-1]["loss_itm"] < 0.5, "a constant predictor would stay at 0.6365"


def test_prompt_is_not_supervised(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batch: Batch
) -> None:
    from blip_core.losses import lm_labels
    from blip_core.objectives import StepInputs

    inputs = StepInputs.from_batch(batch, tokenizer, "a picture of ", 30)
    assert inputs.num_prompt_tokens == 4
    ids, mask = inputs.lm_tokens.input_ids, inputs.lm_tokens.attention_mask
    labels = lm_labels(ids, mask, inputs.num_prompt_tokens)
    assert (labels[:, :4] == -100).all()
    assert tokenizer.decode(labels[0, 4:].tolist()) == batch.captions[0]
    assert (ids[:, 0] == tokenizer.dec_id).all()
    assert (inputs.encoder_input_ids[:, 0] == tokenizer.enc_id).all()
    assert (inputs.tokens.input_ids[:, 0] == tokenizer.cls_id).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"objectives": ("itc", "mlm")}, "objectives must be some of itc, itm, lm"),
        ({"objectives": ()}, "objectives must be some of itc, itm, lm"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"schedule": "cosin"}, "schedule must be one of cosine"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm must be above 0 or None, got 0.0"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
    ],
)
def test_train_config_names_field_value_and_bound(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_text_tokens": 99}, "texts of up to 99 tokens, but text.max_positions is 40"),
        (
            {"max_text_tokens": 40, "prompt": "a red "},
            "texts of up to 42 tokens, but text.max_positions is 40: lower max_text_tokens",
        ),
    ],
)
def test_train_refuses_texts_that_the_model_has_no_positions_for(
    start: Callable[[], MED],
    tokenizer: MEDTokenizer,
    batches: Source,
    tmp_path: Path,
    change: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(start(), tokenizer, batches, _config(**change), tmp_path)
    assert not any(tmp_path.iterdir())


def test_train_refuses_itm_where_nothing_can_draw_its_negatives(
    config: MEDConfig, tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    model = build_model(dataclasses.replace(config, heads=("itm",)), seed=0)
    with pytest.raises(
        ConfigError, match="negatives are drawn by similarity, needs the head 'itc'"
    ):
        train(model, tokenizer, batches, _config(objectives=("itm",)), tmp_path)


def test_history_drops_a_line_cut_by_a_kill(
    start: Callable[[], MED], tokenizer: MEDTokenizer, batches: Source, tmp_path: Path
) -> None:
    train(start(), tokenizer, batches, _config(), tmp_path)
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "lo')
    result = train(start(), tokenizer, batches, _config(), tmp_path)
    assert [line["step"] for line in result.history] == [2, 4, 6, 8, 9]
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [2, 4, 6, 8, 9]
