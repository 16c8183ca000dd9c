"""The losses against slow, obvious versions of themselves, value and gradient."""

import math

import pytest
import torch
from torch import Tensor

from blip_core.losses import IGNORED, itc_loss, itc_targets, itm_loss, lm_loss
from blip_core.momentum import FeatureQueue


def _unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def _log_softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum((value.exp() for value in values), torch.zeros((), dtype=torch.float64)).log()
    return [value - total for value in values]


def _plain_itc(
    own: Tensor,
    others: list[Tensor],
    momentum_own: Tensor,
    positive: list[list[bool]],
    scale: float,
    alpha: float,
) -> Tensor:
    """Row by row: cross-entropy with known matches shared evenly and the teacher's softmax."""
    losses = []
    for row in range(len(own)):
        known = [1.0 / sum(positive[row]) if each else 0.0 for each in positive[row]]
        taught = [
            each.exp() for each in _log_softmax([scale * momentum_own[row] @ o for o in others])
        ]
        predicted = _log_softmax([scale * own[row] @ other for other in others])
        targets = [alpha * t + (1 - alpha) * k for t, k in zip(taught, known, strict=True)]
        losses.append(-sum(t * p for t, p in zip(targets, predicted, strict=True)))
    return sum(losses) / len(own)  # type: ignore[return-value]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "ids", [([1, 2, 3], [7, 8, 9]), ([1, 1, 3], [7, 8, 7])], ids=["one", "many"]
)
def test_itc_with_queue_and_soft_targets_is_the_plain_one(
    alpha: float, ids: tuple[list[int], list[int]]
) -> None:
    image_ids, text_ids = map(torch.tensor, ids)
    queued_images, queued_texts = torch.tensor([3, 5, 1, 6]), torch.tensor([1, 7, 2, 4])
    queue = FeatureQueue(4, 6)  # two of its six places are still empty
    queue.enqueue(_unit(4, 4, seed=1), _unit(4, 4, seed=2), queued_images, queued_texts)
    own = _unit(3, 4, seed=3).requires_grad_()
    momentum_own, momentum_others = _unit(3, 4, seed=4), _unit(3, 4, seed=5)
    scale = 1 / 0.07

    others = [*momentum_others, *_unit(4, 4, seed=2)]
    all_images, all_texts = [*ids[0], *queued_images.tolist()], [*ids[1], *queued_texts.tolist()]
    positive = [
        [ids[0][i] == all_images[j] or ids[1][i] == all_texts[j] for j in range(7)]
        for i in range(3)
    ]
    plain = _plain_itc(own, others, momentum_own, positive, scale, alpha)
    (plain_grad,) = torch.autograd.grad(plain, own)

    is_positive = queue.is_positive(image_ids, text_ids)
    assert is_positive.tolist() == positive
    candidates = torch.stack(others)
    targets = itc_targets(scale * momentum_own @ candidates.T, is_positive, alpha)
    ours = itc_loss(scale * own @ candidates.T, targets)
    (grad,) = torch.autograd.grad(ours, own)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grad, plain_grad)
    sim = queue.similarities(own.float(), momentum_others, "text")
    torch.testing.assert_close(sim, (own @ candidates.T).float(), atol=1e-6, rtol=1e-5)


def test_itm_is_the_plain_one_and_leaves_out_what_has_no_negative() -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.tensor([1, 0, 1, IGNORED, 0, 0])
    chosen = [
        -_log_softmax(list(logits[row]))[label]
        for row, label in enumerate(labels.tolist())
        if label != IGNORED
    ]
    plain: Tensor = sum(chosen) / len(chosen)  # type: ignore[assignment]
    (plain_grad,) = torch.autograd.grad(plain, logits)
    ours = itm_loss(logits, labels)
    (grad,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grad, plain_grad)
    assert not grad[3].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_is_the_plain_one_shifted_and_smoothed(smoothing: float) -> None:
    size = 5
    logits = torch.randn(2, 4, size, generator=torch.Generator().manual_seed(0)).double()
    logits.requires_grad_()
    labels = torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED, IGNORED, 0, 4]])
    losses = []
    for row in range(2):
        for place in range(3):
            label = int(labels[row, place + 1])
            if label == IGNORED:
                continue
            predicted = _log_softmax(list(logits[row, place]))
            even = sum(predicted) / size
            losses.append(-(1 - smoothing) * predicted[label] - smoothing * even)
    plain: Tensor = sum(losses) / len(losses)  # type: ignore[assignment]
    (plain_grad,) = torch.autograd.grad(plain, logits)
    ours = lm_loss(logits, labels, label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grad, plain_grad)
    assert not grad[:, -1].any(), "the last token predicts nothing"
    floor = 0.0 if smoothing == 0 else -(0.9 + 0.1 / size) * math.log(0.9 + 0.1 / size)
    assert ours > floor
