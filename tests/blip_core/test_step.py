"""One optimizer step, seen from outside."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from blip_core import Batch, MEDConfig, MEDTokenizer, TrainConfig, build_model
from blip_core.distributed import World
from blip_core.step import Stepper


def _stepper(config: MEDConfig, tokenizer: MEDTokenizer, **changes: object) -> Stepper:
    """A stepper of a model without dropout, ready for step 0."""
    text = dataclasses.replace(config.text, dropout=0.0)
    model = build_model(dataclasses.replace(config, text=text), seed=0)
    values = {"steps": 4, "batch_size": 8, "queue_size": 16, "weight_decay": 0.0}
    stepper = Stepper(
        model, tokenizer, TrainConfig(**{**values, **changes}), World(), torch.device("cpu")
    )
    stepper.begin()
    return stepper


@pytest.mark.parametrize("limit", [None, 0.01, 1e6])
def test_a_step_clips_gradients_to_the_norm_that_is_asked(
    config: MEDConfig, tokenizer: MEDTokenizer, batch: Batch, limit: float | None
) -> None:
    stepper = _stepper(config, tokenizer, grad_clip_norm=limit)
    done = stepper.do(0, [batch])
    assert done is not None
    before, state = done.of_step["grad_norm"], stepper.optimizer.state
    averages = [state[parameter]["exp_avg"] for parameter in stepper.model.parameters()]
    after = float(torch.stack([average.norm() for average in averages]).norm()) / (1 - 0.9)
    assert before > 0.1, "what is reported is the norm before clipping"
    assert after == pytest.approx(limit if limit == 0.01 else before, rel=1e-3)


def test_matching_leaves_out_what_has_no_negative(
    config: MEDConfig, tokenizer: MEDTokenizer, batch: Batch
) -> None:
    same = dataclasses.replace(batch, captions=[batch.captions[0]] * 8)
    stepper = _stepper(config, tokenizer, objectives=("itm",))
    tokens = tokenizer.encode(same.captions, 30)
    ids, mask = tokenizer.encoder_ids(tokens.input_ids), tokens.attention_mask
    assert same.pixel_values is not None
    with torch.no_grad():
        image_embeds = stepper.model.encode_image(same.pixel_values)
        logits = stepper.model.itm_logits(image_embeds, ids, mask)
    done = stepper.do(0, [same])
    assert done is not None
    losses = done.losses[0]
    assert losses.loss_itm is not None
    assert losses.itm_accuracy_negative is not None
    expected = F.cross_entropy(logits, torch.ones(8, dtype=torch.long))
    torch.testing.assert_close(losses.loss_itm.detach(), expected)
    assert float(losses.itm_accuracy_negative) == 0.0


@pytest.mark.parametrize(
    ("rows", "image_ids", "captions"),
    [
        ([3], ["3"], None),
        ([3] * 8, ["3"] * 8, None),
        (list(range(8)), None, [""] * 8),
    ],
    ids=["one_pair", "one_image_repeated", "texts_without_words"],
)
def test_a_degenerate_batch_has_defined_losses_and_moves_the_model(
    rows: list[int],
    image_ids: list[str] | None,
    captions: list[str] | None,
    config: MEDConfig,
    tokenizer: MEDTokenizer,
    batch: Batch,
) -> None:
    assert batch.pixel_values is not None
    poor = Batch(
        pixel_values=batch.pixel_values[rows],
        captions=captions or [batch.captions[i] for i in range(len(rows))],
        image_ids=image_ids or batch.image_ids,
    )
    stepper = _stepper(config, tokenizer, batch_size=len(rows), queue_size=0)
    before = {name: value.clone() for name, value in stepper.model.state_dict().items()}
    for step in range(2):
        done = stepper.do(step, [poor])
        assert done is not None, "finite"
    numbers = done.losses[0].numbers()
    assert numbers["itm_accuracy_negative"] == 0.0, "nothing is a negative here"
    if len(rows) == 1:
        assert numbers["loss_itc"] == pytest.approx(0.0, abs=1e-6), "one candidate is the answer"
    assert numbers["loss_lm"] > 0
    after = stepper.model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
