import math
from pathlib import Path

import pytest
import torch

from blip_core import MED, Batch, ConfigError, MEDTokenizer, TrainConfig, train
from blip_core.dev_losses import dev_losses
from blip_core.losses import lm_labels, lm_loss
from blip_core.tokenizer import clean_caption


def _config(**changes: object) -> TrainConfig:
    values = {"steps": 30, "batch_size": 8, "learning_rate": 2e-3, "queue_size": 0}
    return TrainConfig(**values | changes)


def test_dev_losses_are_those_of_the_objectives_and_their_sum(
    model: MED, tokenizer: MEDTokenizer, batch: Batch
) -> None:
    found = dev_losses(model, tokenizer, [batch], _config(label_smoothing=0.0))
    assert found["dev_loss"] == pytest.approx(
        found["dev_loss_itc"] + found["dev_loss_itm"] + found["dev_loss_lm"]
    )
    tokens = tokenizer.encode([clean_caption(text) for text in batch.captions], 30)
    with torch.no_grad():
        image_embeds = model.encode_image(batch.pixel_values)
        ids = tokenizer.decoder_ids(tokens.input_ids)
        logits = model.lm_logits(image_embeds, ids, tokens.attention_mask)
        wanted = lm_loss(logits, lm_labels(tokens.input_ids, tokens.attention_mask))
    assert found["dev_loss_lm"] == pytest.approx(float(wanted), rel=1e-4)
    assert dev_losses(model, tokenizer, [batch], _config(objectives=("lm",))).keys() == {
        "dev_loss",
        "dev_loss_lm",
    }


def test_dev_losses_are_the_same_each_time_and_leave_the_generator_alone(
    model: MED, tokenizer: MEDTokenizer, batch: Batch
) -> None:
    torch.manual_seed(5)
    first = dev_losses(model, tokenizer, [batch, batch], _config())
    after = torch.rand(3)
    second = dev_losses(model, tokenizer, [batch, batch], _config())
    assert first == second
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_dev_losses_contrast_counts_equal_texts_as_matches(
    model: MED, tokenizer: MEDTokenizer, batch: Batch
) -> None:
    alike = Batch(
        captions=[batch.captions[0]] * 8,
        image_ids=batch.image_ids,
        pixel_values=batch.pixel_values,
    )
    found = dev_losses(model, tokenizer, [alike], _config(objectives=("itc",)))
    with torch.no_grad():
        tokens = tokenizer.encode(batch.captions[:1], 30)
        texts = model.text_features(tokens.input_ids, tokens.attention_mask)
        images = model.image_features(model.encode_image(batch.pixel_values))
        by_image = (model.scale * images @ texts.T).log_softmax(dim=0)  # (B, 1): over the images
    to_images, to_texts = -float(by_image.mean()), math.log(8)
    assert found["dev_loss"] == pytest.approx((to_images + to_texts) / 2, rel=1e-5)


def test_dev_losses_refuse_to_mean_nothing(model: MED, tokenizer: MEDTokenizer) -> None:
    with pytest.raises(ConfigError, match="at least one batch"):
        dev_losses(model, tokenizer, [], _config())


def test_training_ends_with_the_model_of_the_least_dev_loss(
    model: MED, tokenizer: MEDTokenizer, batch: Batch, tmp_path: Path
) -> None:
    other = Batch(
        captions=batch.captions[::-1],
        image_ids=[f"dev-{name}" for name in batch.image_ids],
        pixel_values=batch.pixel_values,
    )
    config = _config(
        objectives=("lm",),
        steps=60,
        learning_rate=1e-2,  # learned by heart within 20 steps, whatever the CPU's last bits
        best_metric="dev_loss",
        evaluate_every_steps=3,
        patience=3,
    )
    result = train(
        model,
        tokenizer,
        lambda number: batch,
        config,
        tmp_path,
        evaluate=lambda model, step: dev_losses(model, tokenizer, [other], config),
    )
    seen = {line["step"]: line["dev_loss"] for line in result.history if "dev_loss" in line}
    assert result.best_step == min(seen, key=seen.__getitem__)
    assert result.steps < 60, (
        "captions of other pictures get worse while these are learned by heart"
    )
    now = dev_losses(model, tokenizer, [other], config)["dev_loss"]
    assert now == pytest.approx(result.best_value)
