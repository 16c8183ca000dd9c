"""Whether both steps do the same work: small models with the same weights must agree, in float32.

They agree in the three losses, and in the norm of all gradients, three optimizer steps long: the second and
the third see what optimizer, momentum encoders and queue did before. Dropout is off, and gradients are not
clipped (the scale's gradient is another where the parameter is no logarithm).
"""

import dataclasses

import torch
from our_step import OurStep, make_batch
from plain_blip import MAX_TOKENS, PlainBLIP, PlainStep, Recipe
from torch import Tensor, nn

from blip_core import MED, MEDConfig, MEDTokenizer, build_model

CHECKED = Recipe(queue_size=64, learning_rate=1e-3, momentum=0.5, grad_clip_norm=None)
"""Faster than a real step, so that a forgotten update shows."""
TOLERANCE = 1e-4


def check_equal_work(
    tokenizer: MEDTokenizer, device: torch.device, plain_model: type[PlainBLIP] = PlainBLIP
) -> float:
    """Compare our step with the baseline at both paddings; returns the largest relative difference.

    Raises SystemExit with both sides' figures when one is larger than TOLERANCE.
    """
    config = MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, dropout=0.0))
    largest = 0.0
    for tokens in (MAX_TOKENS, None):
        ours = OurStep(build_model(config, seed=0), tokenizer, CHECKED, device)
        plain = PlainStep(plain_model(config, CHECKED), tokenizer, CHECKED, device)
        _start_alike(ours, plain.model)
        for seed in range(3):
            batch = make_batch(config, 6, 12, seed)
            own = ours(batch, "float32")
            torch.manual_seed(torch.initial_seed())  # the baseline draws the same negatives
            theirs = plain(batch, "float32", tokens)
            own = torch.cat([own, gradient_norm(ours.model, without="logit_scale")[None]])
            theirs = torch.cat([theirs, gradient_norm(plain.model, without="temp")[None]])
            with torch.no_grad():
                plain.model.temp.copy_(1 / ours.model.scale)
            off = float(((own - theirs).abs() / theirs.abs()).max())
            if not off <= TOLERANCE:
                raise SystemExit(
                    f"not the same work, step {seed + 1}, padded to {tokens or 'the longest'}: "
                    f"itc, itm, lm and gradient norm are {own.tolist()}, theirs {theirs.tolist()}"
                )
            largest = max(largest, off)
    return largest


def check_equal_size(ours: MED, plain: PlainBLIP) -> int:
    """Return how many parameters are trained; SystemExit where the two models differ."""
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, plain)]
    if counts[0] != counts[1]:
        raise SystemExit(
            f"not the same model: ours has {counts[0]:,} parameters, theirs {counts[1]:,}"
        )
    return counts[0]


@torch.no_grad()
def _start_alike(ours: OurStep, plain: PlainBLIP) -> None:
    """Give the baseline our weights, twins and queue."""
    copy_weights(ours.model, plain)
    for part, twin in plain.twins:
        twin.load_state_dict(part.state_dict())
    plain.image_queue.copy_(ours.momentum.queue.image_queue)
    plain.text_queue.copy_(ours.momentum.queue.text_queue)


@torch.no_grad()
def copy_weights(ours: MED, plain: nn.Module) -> None:
    """Copy all parameters of `ours` into a `PlainBLIP` of the same config."""
    embeddings, vision = plain.vision.embeddings, ours.vision
    embeddings.class_embedding.copy_(vision.cls_token)
    embeddings.position_embedding.copy_(vision.pos_embed)
    pairs = [
        (vision.patch_embed.proj, embeddings.patch_embedding),
        (vision.norm, plain.vision.post_layernorm),
        (ours.vision_proj, plain.vision_proj),
        (ours.text_proj, plain.text_proj),
        (ours.itm_head, plain.itm_head),
    ]
    for block, layer in zip(vision.blocks, plain.vision.encoder.layers, strict=True):
        pairs += [
            (block.norm1, layer.layer_norm1),
            (block.attn.qkv, layer.self_attn.qkv),
            (block.attn.proj, layer.self_attn.projection),
            (block.norm2, layer.layer_norm2),
            (block.mlp.fc1, layer.mlp.fc1),
            (block.mlp.fc2, layer.mlp.fc2),
        ]
    decoder, head = plain.text_decoder.bert, plain.text_decoder.cls.predictions
    pairs += [
        (ours.text.word_embeddings, decoder.embeddings.word_embeddings),
        (ours.text.position_embeddings, decoder.embeddings.position_embeddings),
        (ours.text.embedding_norm, decoder.embeddings.LayerNorm),
        (ours.lm_head.dense, head.transform.dense),
        (ours.lm_head.norm, head.transform.LayerNorm),
    ]
    head.bias.copy_(ours.lm_head.bias)
    plain.temp.copy_(1 / ours.scale)
    encoders = plain.text_encoder.encoder.layer
    for mine, enc, dec in zip(ours.text.layers, encoders, decoder.encoder.layer, strict=True):
        for attention, layer in ((mine.encoder_attention, enc), (mine.decoder_attention, dec)):
            inner = layer.attention.self
            _split(attention.qkv, inner.query, inner.key, inner.value)
            pairs += [
                (attention.output, layer.attention.output.dense),
                (attention.norm, layer.attention.output.LayerNorm),
            ]
        cross, theirs = mine.cross_attention, dec.crossattention
        _split(cross.kv, theirs.self.key, theirs.self.value)
        pairs += [
            (cross.query, theirs.self.query),
            (cross.output, theirs.output.dense),
            (cross.norm, theirs.output.LayerNorm),
            (mine.feed_forward.intermediate, dec.intermediate.dense),
            (mine.feed_forward.output, dec.output.dense),
            (mine.feed_forward.norm, dec.output.LayerNorm),
        ]
    for source, target in pairs:
        for mine, theirs in zip(source.parameters(), target.parameters(), strict=True):
            theirs.copy_(mine)


def _split(fused: nn.Linear, *parts: nn.Linear) -> None:
    for kind in ("weight", "bias"):
        for piece, part in zip(getattr(fused, kind).chunk(len(parts)), parts, strict=True):
            getattr(part, kind).copy_(piece)


def gradient_norm(model: nn.Module, *, without: str) -> Tensor:
    """Norm () of all gradients but that of the parameter named `without`."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
    return torch.stack([g.norm() for name, g in named if g is not None and name != without]).norm()
