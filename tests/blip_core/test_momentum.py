import copy

import pytest
import torch
from torch import Tensor

from blip_core import MED, MEDTokenizer
from blip_core.momentum import FeatureQueue, MomentumEncoders


def _fill(queue: FeatureQueue, start: int, count: int) -> None:
    values = torch.arange(start, start + count, dtype=torch.float32)
    features = values[:, None].expand(count, 2)
    queue.enqueue(features, -features, values.long(), values.long() + 100)


def test_queue_starts_empty_and_wraps_at_any_size() -> None:
    queue = FeatureQueue(embed_width=2, queue_size=7)
    batch = torch.zeros(3, 2)
    assert queue.similarities(batch, batch, "image").shape == (3, 3)
    for start in (0, 3, 6):
        _fill(queue, start, 3)
    assert queue.num_valid == 7
    assert sorted(queue.image_ids.tolist()) == [2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(queue.image_queue[0].long(), queue.image_ids)
    assert torch.equal(-queue.text_queue[1].long() + 100, queue.text_ids)
    assert queue.similarities(batch, batch[:2], "text").shape == (3, 2 + 7)


def test_queue_keeps_the_end_of_a_batch_larger_than_itself() -> None:
    queue = FeatureQueue(embed_width=2, queue_size=4)
    _fill(queue, 0, 6)
    assert sorted(queue.image_ids.tolist()) == [2, 3, 4, 5]


def test_queue_of_size_0_stays_empty() -> None:
    queue = FeatureQueue(embed_width=2, queue_size=0)
    _fill(queue, 0, 3)
    assert queue.similarities(torch.zeros(3, 2), torch.zeros(3, 2), "image").shape == (3, 3)


def test_positives_are_same_image_or_same_text_in_batch_and_queue() -> None:
    queue = FeatureQueue(embed_width=2, queue_size=4)
    queue.enqueue(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([1, 9]), torch.tensor([5, 6]))
    positive = queue.is_positive(torch.tensor([1, 2, 3]), torch.tensor([7, 7, 6]))
    assert positive.int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1]]


@pytest.mark.parametrize("side", ["image", "text"])
def test_similarities_are_cosines_with_the_batch_then_with_the_queue(side: str) -> None:
    queue = FeatureQueue(embed_width=2, queue_size=4)
    _fill(queue, 1, 3)
    features, batch = torch.tensor([[1.0, 0.5]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    sign = 1.0 if side == "image" else -1.0
    expected = torch.tensor([[5.0, 0.5, 1.5 * sign, 3.0 * sign, 4.5 * sign]])
    torch.testing.assert_close(queue.similarities(features, batch, side), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(queue.similarities(features, batch, side), expected)


def test_update_is_an_exponential_moving_average(model: MED) -> None:
    twins = MomentumEncoders(model, queue_size=8)
    before = copy.deepcopy(dict(twins.named_parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    twins.update(model, momentum=0.9)
    online = dict(model.named_parameters())
    for name, twin in twins.named_parameters():
        torch.testing.assert_close(twin, 0.9 * before[name] + 0.1 * online[name])
        assert not twin.requires_grad


@torch.no_grad()
def test_twins_give_the_features_of_the_model_at_the_start(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    twins = MomentumEncoders(model, queue_size=8)
    assert not twins.train().training, "dropout stays off in the twins"
    assert not any("decoder" in name or "cross" in name for name, _ in twins.named_parameters())
    tokens = tokenizer.encode(texts[:4], 20)
    image, text = twins.features(pixel_values[:4], tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(image, model.image_features(model.encode_image(pixel_values[:4])))
    torch.testing.assert_close(text, model.text_features(tokens.input_ids, tokens.attention_mask))


@torch.no_grad()
def test_twins_keep_dropout_only_when_the_teacher_is_in_train_mode(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    tokens = tokenizer.encode(texts[:4], 20)
    inputs = (pixel_values[:4], tokens.input_ids, tokens.attention_mask)
    for mode, is_noisy in (("eval", False), ("train", True)):
        twins = MomentumEncoders(model, queue_size=8, mode=mode)
        twins.eval()
        (_, first), (_, second) = twins.features(*inputs), twins.features(*inputs)
        assert torch.equal(first, second) != is_noisy, mode


def test_queue_size_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="queue_size must be 0 or more, got -1"):
        FeatureQueue(embed_width=2, queue_size=-1)


@torch.no_grad()
def test_features_of_given_image_embeds_are_those_of_the_pixels(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, texts: list[str]
) -> None:
    twins = MomentumEncoders(model, queue_size=8)
    tokens = tokenizer.encode(texts[:4], 20)
    inputs = (pixel_values[:4], tokens.input_ids, tokens.attention_mask)
    spared = twins.features(*inputs, model.encode_image(pixel_values[:4]))
    torch.testing.assert_close(spared, twins.features(*inputs))
