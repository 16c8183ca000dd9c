import itertools

import pytest

from blip_core import MED, ConfigError
from blip_core.schedule import learning_rate, parameter_groups, ramp

RUN = {"steps": 100, "peak": 1e-3, "minimum": 1e-5, "warmup_steps": 10}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step_decay"])
def test_rate_warms_up_to_the_peak_and_never_rises_again(schedule: str) -> None:
    rates = [learning_rate(step, schedule=schedule, **RUN) for step in range(100)]
    assert rates[0] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 10)
    assert rates[9] == pytest.approx(1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert min(rates[10:]) >= 1e-5


def test_rate_ends_where_the_schedule_says() -> None:
    assert learning_rate(55, schedule="cosine", **RUN) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(100, schedule="linear", **RUN) == pytest.approx(1e-5)
    assert learning_rate(99, schedule="constant", **RUN) == 1e-3
    assert learning_rate(99, schedule="step_decay", **RUN) == pytest.approx(1e-3 * 0.9**19)


def test_rate_without_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, steps=5, peak=1e-3, minimum=0.0, warmup_steps=0) == 1e-3


def test_rate_refuses_an_unknown_schedule() -> None:
    with pytest.raises(ConfigError, match="schedule must be one of cosine"):
        learning_rate(0, schedule="cosin", **RUN)


def test_ramp_is_linear_and_then_constant() -> None:
    assert [ramp(step, 0.4, 4) for step in (0, 1, 2, 4, 9)] == [0.0, 0.1, 0.2, 0.4, 0.4]
    assert ramp(0, 0.4, 0) == 0.4


def test_parameter_groups_decay_matrices_only_and_cover_every_trainable(model: MED) -> None:
    model.vision.norm.weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    in_kept = {names[parameter] for parameter in kept["params"]}
    assert {"logit_scale", "vision.pos_embed", "text.position_embeddings.weight"} <= in_kept
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    covered = in_kept | {names[parameter] for parameter in decayed["params"]}
    assert covered == set(names.values()) - {"vision.norm.weight"}


def test_rate_decays_once_an_epoch_and_never_below_the_minimum() -> None:
    rates = [
        learning_rate(
            step, schedule="epoch_decay", decay_rate=0.5, steps_per_epoch=20, **RUN | {"steps": 300}
        )
        for step in range(300)
    ]
    assert rates[19] == pytest.approx(1e-3)
    assert rates[20] == rates[39] == pytest.approx(5e-4)
    assert rates[60] == pytest.approx(1.25e-4)
    assert rates[299] == 1e-5


def test_parameter_groups_decay_everything_when_asked_to(model: MED) -> None:
    (group,) = parameter_groups(model, 0.05, "all")
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == len(list(model.parameters()))


def test_parameter_groups_give_fresh_parts_their_own_rate(model: MED) -> None:
    groups = parameter_groups(model, 0.05, fresh_lr_scale=10.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scales) == set(names.values())
    fast = {name for name, scale in scales.items() if scale == 10.0}
    assert "itm_head.weight" in fast
    assert "text.layers.0.cross_attention.kv.weight" in fast
    slow = set(scales) - fast
    assert all(name.startswith(("vision.", "text.")) for name in slow)
    assert "text.layers.0.encoder_attention.qkv.weight" in slow
