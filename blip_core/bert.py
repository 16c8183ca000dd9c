"""Start the text transformer from a BERT folder, as the paper does (BLIP, section 3.1).

Both self-attentions, the feed-forward and the embeddings come from BERT; cross-attention and the two new
vocabulary rows keep their random start. The text transformer has no token types, and BERT always adds the
vector of segment 0: it is folded into the position embeddings, so that the text mode computes what BERT does.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from blip_core.config import TextConfig
from blip_core.errors import CheckpointError
from blip_core.text import LMHead, SelfAttention, TextTransformer
from blip_core.weight_files import WEIGHTS, read_safetensors


def init_from_bert(
    text: TextTransformer, folder: str | Path, *, lm_head: LMHead | None = None
) -> None:
    """Copy a Hugging Face BERT folder (config.json, model.safetensors) into `text`.

    BERT's shape must be the configuration's, its vocabulary no larger, its positions and layers no fewer; of
    more layers the first are taken. With
    `lm_head`, BERT's masked-LM head is copied too where the folder has one. Raises CheckpointError.
    """
    folder = Path(folder)
    _check_shape(folder, text.config)
    state = _read(folder)
    with torch.no_grad():
        _copy_embeddings(text, state)
        for index, layer in enumerate(text.stack()):
            prefix = f"encoder.layer.{index}."
            for attention in layer.children():  # of one role or of both
                if isinstance(attention, SelfAttention):
                    _copy_attention(attention, state, prefix + "attention.")
            feed_forward = layer.feed_forward
            _copy(feed_forward.intermediate, state, prefix + "intermediate.dense")
            _copy(feed_forward.output, state, prefix + "output.dense")
            _copy(feed_forward.norm, state, prefix + "output.LayerNorm")
        if lm_head is not None and "cls.predictions.bias" in state:
            _copy(lm_head.dense, state, "cls.predictions.transform.dense")
            _copy(lm_head.norm, state, "cls.predictions.transform.LayerNorm")
            bias = state["cls.predictions.bias"]
            lm_head.bias[: len(bias)].copy_(bias)


def _check_shape(folder: Path, config: TextConfig) -> None:
    try:
        theirs = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{folder} is not a BERT folder: config.json: {err}") from err
    for ours, key in (
        ("width", "hidden_size"),
        ("num_heads", "num_attention_heads"),
        ("ffn_width", "intermediate_size"),
    ):
        if getattr(config, ours) != theirs.get(key):
            raise CheckpointError(
                f"BERT in {folder} has {key} {theirs.get(key)}, but text.{ours} is "
                f"{getattr(config, ours)}: choose a configuration of the same shape"
            )
    if config.depth > theirs.get("num_hidden_layers", 0):
        raise CheckpointError(
            f"BERT in {folder} has num_hidden_layers {theirs.get('num_hidden_layers')}, but text.depth is "
            f"{config.depth}: choose a configuration with no more layers"
        )


def _read(folder: Path) -> dict[str, Tensor]:
    state = read_safetensors(folder / WEIGHTS, "BERT weights")
    return {key.removeprefix("bert."): value.float() for key, value in state.items()}


def _copy_embeddings(text: TextTransformer, state: dict[str, Tensor]) -> None:
    words = _get(state, "embeddings.word_embeddings.weight")
    positions = _get(state, "embeddings.position_embeddings.weight")
    if len(words) > text.config.vocab_size:
        raise CheckpointError(
            f"BERT has {len(words)} word pieces, but text.vocab_size is {text.config.vocab_size}"
        )
    if len(positions) < text.config.max_positions:
        raise CheckpointError(
            f"BERT has {len(positions)} positions, but text.max_positions is {text.config.max_positions}"
        )
    text.word_embeddings.weight[: len(words)].copy_(words)
    segment = state.get("embeddings.token_type_embeddings.weight")
    folded = positions if segment is None else positions + segment[0]
    text.position_embeddings.weight.copy_(folded[: text.config.max_positions])
    _copy(text.embedding_norm, state, "embeddings.LayerNorm")


def _copy_attention(attention: SelfAttention, state: dict[str, Tensor], prefix: str) -> None:
    for part in ("weight", "bias"):
        stacked = [_get(state, f"{prefix}self.{name}.{part}") for name in ("query", "key", "value")]
        getattr(attention.qkv, part).copy_(torch.cat(stacked))
    _copy(attention.output, state, prefix + "output.dense")
    _copy(attention.norm, state, prefix + "output.LayerNorm")


def _copy(module: torch.nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(_get(state, f"{prefix}.{name}"))


def _get(state: dict[str, Tensor], key: str) -> Tensor:
    if key in state:
        return state[key]
    legacy = key.replace("LayerNorm.weight", "LayerNorm.gamma")
    legacy = legacy.replace("LayerNorm.bias", "LayerNorm.beta")
    if legacy in state:
        return state[legacy]
    raise CheckpointError(f"BERT weights lack {key}")
