"""The same weights in our model and in one made of transformers' classes."""

import torch
from torch import Tensor, nn

from blip_core.med import MED


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
