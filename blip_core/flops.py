"""Analytic floating-point operations of one training step; a multiply-add counts as two.

Matrix products only (linear layers, attention, patches, vocabulary). Backward counts twice its forward.
Recomputed activations are not counted, so that utilisation speaks of useful work.

Dimension key: B images, P image tokens, L text tokens, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch

from blip_core.config import MEDConfig
from blip_core.objectives import Objective

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second by a word in the device's name (the makers' data sheets)."""

_ITM_ROWS = 3
"""Pairs of ITM for each image: one positive, two negatives."""


def step_flops(
    config: MEDConfig,
    *,
    num_text_tokens: int,
    objectives: Sequence[Objective],
    vision_frozen: bool = False,
    num_lm_tokens: int | None = None,
    num_projections: int = 1,
) -> float:
    """Return operations of one training step per image, momentum encoders included.

    `num_text_tokens` is the padded length L of a text; the language-modelling head runs on `num_lm_tokens` of
    them (all but one by default). An image's keys and values are computed once, or `num_projections` times.
    """
    vision = vision_flops(config)
    fused = _text_layers(config, num_text_tokens, with_image=True)
    total = vision * (1 if vision_frozen else 3)
    if "itc" in objectives:
        text = _text_layers(config, num_text_tokens, with_image=False)
        total += 3 * text + text + (0 if vision_frozen else vision)  # the last two: momentum
    elif "itm" in objectives:
        total += _text_layers(config, num_text_tokens, with_image=False)  # chooses negatives
    if "itm" in objectives or "lm" in objectives:
        total += 3 * num_projections * _image_projections(config)
    if "itm" in objectives:
        total += 3 * _ITM_ROWS * fused
    if "lm" in objectives:
        tokens = num_text_tokens - 1 if num_lm_tokens is None else num_lm_tokens
        width = config.text.width
        total += 3 * (fused + 2 * tokens * (width * width + width * config.text.vocab_size))
    return total


def vision_flops(config: MEDConfig) -> float:
    """Return operations of one image's forward pass through the vision encoder."""
    vision = config.vision
    tokens, width = vision.num_tokens, vision.width
    linear = (4 + 2 * vision.mlp_ratio) * width * width
    per_block = 2 * tokens * linear + 4 * tokens * tokens * width
    patches = 2 * (tokens - 1) * 3 * vision.patch_size_px**2 * width
    return vision.depth * per_block + patches


def _text_layers(config: MEDConfig, num_tokens: int, *, with_image: bool) -> float:
    """One text's forward pass; keys and values of the image are counted elsewhere, once for all texts."""
    text = config.text
    linear = 4 * text.width**2 + 2 * text.width * text.ffn_width
    per_layer = 2 * num_tokens * linear + 4 * num_tokens**2 * text.width
    if with_image:
        per_layer += 4 * num_tokens * text.width**2
        per_layer += 4 * num_tokens * config.vision.num_tokens * text.width
    return text.depth * per_layer


def _image_projections(config: MEDConfig) -> float:
    """Keys and values of one image for every cross-attention, forward."""
    text = config.text
    return text.depth * 4.0 * config.vision.num_tokens * text.encoder_width * text.width


def known_peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a GPU that is known by name, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_FLOPS.items() if word in name), None)
