import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from blip_core.watch import CONSTANT_ITM_LOSS, Watch, mean_cosine


def _line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 3.0, "grad_norm": 1.0, **values}


def test_watch_names_matching_that_stays_at_a_constant_answer_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = Watch(warmup_steps=20)
    with caplog.at_level(logging.WARNING):
        for step in range(10, 110, 10):
            watch.see(_line(step, loss_itm=CONSTANT_ITM_LOSS + 0.002))
    assert [(each.name, each.step) for each in watch.warned] == [("itm_stuck", 70)]
    assert "Start from trained weights" in caplog.text
    assert caplog.text.count("itm_stuck") == 1


def test_watch_says_nothing_while_matching_moves_or_is_not_trained() -> None:
    watch = Watch()
    for step in range(20):
        watch.see(_line(step, loss_itm=CONSTANT_ITM_LOSS if step % 4 else 0.55))
    for step in range(20, 40):
        watch.see(_line(step, loss_itm=None))
    assert watch.warned == []


@pytest.mark.parametrize("side", ["image", "text"])
def test_watch_names_collapsed_features_and_their_side(side: str) -> None:
    watch = Watch(warmup_steps=2)
    cosines = [0.995, 0.995, 0.995, 0.995, 0.98, 0.995, 0.995, 0.995]
    begun = [watch.see(_line(step + 1, **{f"{side}_cosine": c})) for step, c in enumerate(cosines)]
    assert [each.name for each in begun[7]] == ["collapsed_features"]
    assert not any(begun[:7]), "alike during warm-up, or for two lines only"
    assert begun[7][0].message.startswith(f"{side} features are all alike")


def test_watch_names_an_exploding_norm_against_what_was_usual() -> None:
    watch = Watch()
    for step in range(8):
        watch.see(_line(step, grad_norm=2.0))
    assert watch.see(_line(8, grad_norm=19.0)) == []
    (warning,) = watch.see(_line(9, grad_norm=21.0))
    assert (warning.name, warning.step) == ("exploding_norm", 9)
    assert "usual was 2" in warning.message


def test_watch_warns_again_after_a_problem_has_gone() -> None:
    watch = Watch()
    cosines = [0.999] * 5 + [0.5] + [0.999] * 3
    for step, cosine in enumerate(cosines, start=1):
        watch.see(_line(step, image_cosine=cosine))
    assert [each.step for each in watch.warned] == [3, 9]


def test_watch_fed_the_old_lines_goes_on_as_if_never_stopped() -> None:
    lines = [_line(step, loss_itm=CONSTANT_ITM_LOSS, grad_norm=1.0 + step) for step in range(9)]
    lines.insert(4, {"step": 4, "dev_loss": 2.0})
    whole, resumed = Watch(), Watch()
    for line in lines:
        whole.see(line)
    for index, line in enumerate(lines):
        resumed.see(line, quiet=index < 5)
    assert resumed.warned == whole.warned
    assert [each.name for each in whole.warned] == ["itm_stuck"]


def test_mean_cosine_leaves_out_a_row_with_itself() -> None:
    features = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = features @ features.T
    expected = (cosines.sum() - cosines.diagonal().sum()) / (7 * 6)
    torch.testing.assert_close(mean_cosine(features), expected)
    assert float(mean_cosine(features[:1])) == pytest.approx(0.0, abs=1e-6)
    assert float(mean_cosine(features[:1].expand(4, -1))) == pytest.approx(1.0, abs=1e-5)


def test_watch_names_steps_left_out_once_until_a_good_one_comes() -> None:
    watch = Watch()
    for step, is_bad in enumerate([True, True, False, True], start=1):
        watch.see({"step": step, "not_finite": 1.0} if is_bad else _line(step))
    assert [(each.name, each.step) for each in watch.warned] == [
        ("not_finite", 1),
        ("not_finite", 4),
    ]
    assert "use dtype float32" in watch.warned[0].message
