"""The losses of a training on pairs that it does not see: by these the best model is kept.

Dimension key: B batch.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.config import require
from blip_core.losses import itc_loss
from blip_core.med import MED
from blip_core.objectives import Batch, StepInputs, compute_losses
from blip_core.tokenizer import MEDTokenizer
from blip_core.train_config import TrainConfig

DEV_LOSS = "dev_loss"


@torch.no_grad()
def dev_losses(
    model: MED,
    tokenizer: MEDTokenizer,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    vision_frozen: bool = False,
) -> dict[str, float]:
    """Return dev_loss_itc, dev_loss_itm, dev_loss_lm as far as they are trained, and their sum `dev_loss`.

    Means over `batches`, weighed by their rows. `model` must be in evaluation mode. ITC contrasts each batch
    with itself alone: no teacher, no queue, no smoothing. Negatives are hard, and drawn alike in every call,
    so that two models of one run are asked the same. Raises ConfigError when there is no batch.
    """
    device, totals, num_rows = model.device, dict[str, float](), 0
    others = tuple(name for name in config.objectives if name != "itc")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for batch in batches:
            inputs = StepInputs.from_batch(
                batch, tokenizer, config.prompt, config.max_text_tokens
            ).to(device)
            values: dict[str, Tensor | None] = {}
            enabled = config.dtype == "bfloat16"
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                if "itc" in config.objectives:
                    values["itc"] = _contrast(model, inputs)
                if others:
                    losses = compute_losses(
                        model,
                        None,
                        inputs,
                        objectives=others,
                        distill_alpha=0.0,
                        label_smoothing=config.label_smoothing,
                        vision_frozen=vision_frozen,
                    )
                    values |= {"itm": losses.loss_itm, "lm": losses.loss_lm}
            count = len(batch.captions)
            num_rows += count
            for name, value in values.items():
                if value is not None:
                    totals[name] = totals.get(name, 0.0) + count * float(value)
    require(num_rows > 0, "dev_losses needs at least one batch")
    means = {f"{DEV_LOSS}_{name}": total / num_rows for name, total in totals.items()}
    return means | {DEV_LOSS: sum(means.values())}


def _contrast(model: MED, inputs: StepInputs) -> Tensor:
    """Return the contrastive loss () of a batch with itself; equal images or texts share the target."""
    image_embeds = inputs.image_embeds
    if image_embeds is None:
        assert inputs.pixel_values is not None
        image_embeds = model.encode_image(inputs.pixel_values)
    tokens = inputs.tokens
    images = model.image_features(image_embeds).float()
    texts = model.text_features(tokens.input_ids, tokens.attention_mask).float()
    sim = model.scale * images @ texts.T
    same = inputs.image_ids[:, None] == inputs.image_ids[None, :]
    known = (same | (inputs.text_ids[:, None] == inputs.text_ids[None, :])).float()
    targets = F.normalize(known, p=1.0, dim=1)
    return (itc_loss(sim, targets) + itc_loss(sim.T, targets)) / 2
