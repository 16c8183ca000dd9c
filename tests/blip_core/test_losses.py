import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.losses import itc_loss, itc_targets, itm_loss, lm_labels, lm_loss


def test_itm_loss_of_a_constant_predictor_is_0_6365() -> None:
    labels = torch.tensor([1, 0, 0] * 10)
    prior = torch.tensor([[math.log(2 / 3), math.log(1 / 3)]]).expand(30, 2)
    assert itm_loss(prior, labels).item() == pytest.approx(0.6365, abs=1e-4)


def test_lm_loss_cannot_fall_below_1_358_with_smoothing_and_the_vocabulary_of_bert() -> None:
    vocab_size = 30524
    label = torch.tensor([[5, 7]])
    # the best a model can do: exactly the smoothed distribution
    probs = torch.full((vocab_size,), 0.1 / vocab_size, dtype=torch.float64)
    probs[7] += 0.9
    logits = probs.log().expand(1, 2, vocab_size)
    assert lm_loss(logits, label, label_smoothing=0.1).item() == pytest.approx(1.358, abs=1e-3)


def test_lm_loss_shifts_so_that_copying_the_input_is_no_solution() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 2]])
    copies_input = F.one_hot(ids, 6).float() * 100
    predicts_next = F.one_hot(ids.roll(-1, dims=1), 6).float() * 100
    assert lm_loss(copies_input, ids).item() > 10
    assert lm_loss(predicts_next, ids).item() == pytest.approx(0.0)


def test_lm_loss_is_the_mean_over_supervised_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = lm_labels(ids, mask, num_prompt_tokens=2)
    expected = [
        -logits[row, t].log_softmax(-1)[ids[row, t + 1]]
        for row in range(2)
        for t in range(4)
        if mask[row, t + 1] and t + 1 >= 2
    ]
    assert len(expected) == 4
    torch.testing.assert_close(lm_loss(logits, labels), torch.stack(expected).mean())


def test_lm_loss_is_zero_when_nothing_is_supervised() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = lm_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(1, 3, 5))


def test_itc_targets_mix_momentum_and_all_positives() -> None:
    sim = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    positive = torch.tensor([[True, False, True], [False, True, False]])
    targets = itc_targets(sim, positive, 0.4)
    expected = 0.4 * sim.softmax(1) + 0.6 * torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))


def test_itc_loss_is_cross_entropy_with_hard_targets() -> None:
    sim: Tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(4, 6)
    torch.testing.assert_close(itc_loss(sim, targets), F.cross_entropy(sim, torch.arange(4)))
