"""The same weights in transformers' BLIP and in ours give the same numbers.

Known differences of transformers, set up here and not papered over: it leaves [CLS] where [ENC] belongs, and
its vision LayerNorm epsilon has another default.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip_core import MED, MEDConfig, build_model
from blip_core.text import SelfAttention

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "encoder_hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "bos_token_id": 5,
    "sep_token_id": 3,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.2,
}


def _theirs(model_class: type) -> nn.Module:
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=TEXT, vision_config=VISION, image_text_hidden_size=16, projection_dim=16
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: make all count
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other)


def _copy_vision(ours: MED, theirs: nn.Module) -> None:
    embeddings, vision = theirs.embeddings, ours.vision
    with torch.no_grad():
        vision.cls_token.copy_(embeddings.class_embedding)
        vision.pos_embed.copy_(embeddings.position_embedding)
    _copy(vision.patch_embed.proj, embeddings.patch_embedding)
    _copy(vision.norm, theirs.post_layernorm)
    for block, layer in zip(vision.blocks, theirs.encoder.layers, strict=True):
        _copy(block.norm1, layer.layer_norm1)
        _copy(block.norm2, layer.layer_norm2)
        _copy(block.attn.qkv, layer.self_attn.qkv)
        _copy(block.attn.proj, layer.self_attn.projection)
        _copy(block.mlp.fc1, layer.mlp.fc1)
        _copy(block.mlp.fc2, layer.mlp.fc2)


def _stack(ours: nn.Linear, *theirs: nn.Linear) -> None:
    with torch.no_grad():
        ours.weight.copy_(torch.cat([linear.weight for linear in theirs]))
        ours.bias.copy_(torch.cat([linear.bias for linear in theirs]))


def _copy_attention(ours: SelfAttention, theirs: nn.Module) -> None:
    own = theirs.self
    _stack(ours.qkv, own.query, own.key, own.value)
    _copy(ours.output, theirs.output.dense)
    _copy(ours.norm, theirs.output.LayerNorm)


def _copy_text(ours: MED, theirs: nn.Module, role: str) -> None:
    text = ours.text
    _copy(text.word_embeddings, theirs.embeddings.word_embeddings)
    _copy(text.position_embeddings, theirs.embeddings.position_embeddings)
    _copy(text.embedding_norm, theirs.embeddings.LayerNorm)
    for mine, layer in zip(text.layers, theirs.encoder.layer, strict=True):
        _copy_attention(getattr(mine, f"{role}_attention"), layer.attention)
        cross, other = mine.cross_attention, layer.crossattention.self
        _copy(cross.query, other.query)
        _stack(cross.kv, other.key, other.value)
        _copy(cross.output, layer.crossattention.output.dense)
        _copy(cross.norm, layer.crossattention.output.LayerNorm)
        _copy(mine.feed_forward.intermediate, layer.intermediate.dense)
        _copy(mine.feed_forward.output, layer.output.dense)
        _copy(mine.feed_forward.norm, layer.output.LayerNorm)


@pytest.fixture
def ours() -> MED:
    return build_model(MEDConfig.preset("tiny", vocab_size=64), seed=0).eval()


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[5, 10, 11, 12, 3], [5, 20, 21, 3, 0]])
    return ids, (ids != 0).long()


@torch.no_grad()
def test_captioner_computes_what_transformers_does(
    ours: MED, pixel_values: Tensor, texts: tuple[Tensor, Tensor]
) -> None:
    theirs = _theirs(BlipForConditionalGeneration)
    _copy_vision(ours, theirs.vision_model)
    _copy_text(ours, theirs.text_decoder.bert, "decoder")
    head = theirs.text_decoder.cls.predictions
    _copy(ours.lm_head.dense, head.transform.dense)
    _copy(ours.lm_head.norm, head.transform.LayerNorm)
    ours.lm_head.bias.copy_(head.bias)
    ids, mask = texts
    output = theirs(pixel_values=pixel_values[:2], input_ids=ids, attention_mask=mask)
    image_embeds = ours.encode_image(pixel_values[:2])
    torch.testing.assert_close(image_embeds, output.last_hidden_state, atol=1e-4, rtol=1e-4)
    untied = head.decoder.weight
    hidden_logits = ours.lm_logits(image_embeds, ids, mask)
    if not torch.equal(untied, ours.text.word_embeddings.weight):
        pytest.fail("transformers no longer ties the head: copy it before comparing")
    real = mask.bool()
    torch.testing.assert_close(hidden_logits[real], output.logits[real], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_filter_computes_what_transformers_does(
    ours: MED, pixel_values: Tensor, texts: tuple[Tensor, Tensor]
) -> None:
    theirs = _theirs(BlipForImageTextRetrieval)
    _copy_vision(ours, theirs.vision_model)
    _copy_text(ours, theirs.text_encoder, "encoder")
    _copy(ours.vision_proj, theirs.vision_proj)
    _copy(ours.text_proj, theirs.text_proj)
    _copy(ours.itm_head, theirs.itm_head)
    ids, mask = texts
    arguments = {"pixel_values": pixel_values[:2], "input_ids": ids, "attention_mask": mask}
    image_embeds = ours.encode_image(pixel_values[:2])
    expected = theirs(**arguments, use_itm_head=True).itm_score
    torch.testing.assert_close(
        ours.itm_logits(image_embeds, ids, mask), expected, atol=1e-3, rtol=1e-3
    )
    sim = ours.image_features(image_embeds) @ ours.text_features(ids, mask).T
    expected = theirs(**arguments, use_itm_head=False).itm_score
    torch.testing.assert_close(sim, expected, atol=1e-4, rtol=1e-3)
