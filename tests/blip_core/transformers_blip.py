"""Small BLIP models of transformers with random weights, of ordinary and of odd shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BlipConfig

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "bos_token_id": 5,
    "sep_token_id": 3,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Shape:
    """What differs from the smallest model."""

    text: dict[str, Any]
    vision: dict[str, Any]
    embed_width: int = 16

    @property
    def image_size(self) -> int:
        return {**VISION, **self.vision}["image_size"]

    def config(self) -> BlipConfig:
        return BlipConfig(
            text_config={**TEXT, **self.text},
            vision_config={**VISION, **self.vision},
            image_text_hidden_size=self.embed_width,
        )


SHAPES = {
    "plain": Shape({}, {}),
    "wide_vision": Shape(  # as ViT-L beside BERT-base: wider, deeper and with more heads
        {"num_hidden_layers": 3, "num_attention_heads": 4},
        {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 6}
        | {"num_attention_heads": 3, "image_size": 48},
        embed_width=24,
    ),
    "wide_text": Shape(
        {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 5, "vocab_size": 91}
        | {"layer_norm_eps": 1e-5, "max_position_embeddings": 23},
        {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 4, "patch_size": 14}
        | {"image_size": 42, "layer_norm_eps": 1e-3, "num_hidden_layers": 1},
        embed_width=7,
    ),
    "deep_text": Shape(
        {
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "vocab_size": 130,
            "layer_norm_eps": 0.1,
        },
        {"patch_size": 8, "layer_norm_eps": 1e-6},
    ),
}


def build(model_class: type, shape: Shape, *, seed: int = 0) -> nn.Module:
    """A model whose every parameter counts: biases and norms are moved from 0 and 1."""
    torch.manual_seed(seed)
    model = model_class(shape.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Save as transformers does."""
    model.save_pretrained(folder, **options)
    return folder
