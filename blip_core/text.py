"""The text transformer: BERT's layers, cross-attention, and one stack in two roles (BLIP, section 3.1).

The encoder and the decoder share embeddings, cross-attention and feed-forward; each has its own
self-attention. Three modes: "text" (bidirectional, no image), "fused" (bidirectional, cross-attention) and
"causal" (decoder, cross-attention).

Dimension key: B batch, P image tokens, L text tokens, D width, H heads, K head width, V vocabulary, N pairs.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.attention import attend
from blip_core.config import TextConfig
from blip_core.dropout import dropout

Mode = Literal["text", "fused", "causal"]
Part = Literal["encoder", "decoder", "cross"]
"""What a layer may go without: the self-attention of a role, or cross-attention."""
ALL_PARTS: tuple[Part, ...] = ("encoder", "decoder", "cross")
KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention, each (B, H, L or P, K)."""


class SelfAttention(nn.Module):
    """Post-norm self-attention of one layer and one role."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        *,
        first_only: bool = False,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, 1, D) with `first_only`."""
        if first_only:
            query, key, value = self._project_first(hidden)
            hidden = hidden[:, :1]
        else:
            query, key, value = self._split(self.qkv(hidden), 3)  # (B, H, L, K) each
        weight_dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, mask, dropout_p=weight_dropout)
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        normed: Tensor = self.norm(hidden + dropout(mixed, self.dropout, self.training))
        return normed

    def _project_first(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the query of the first token (B, H, 1, K), and keys and values of all."""
        if not isinstance(self.qkv, nn.Linear):  # packed: its weights cannot be cut
            query, key, value = self._split(self.qkv(hidden), 3)
            return query[:, :, :1], key, value
        width, weight, bias = hidden.shape[-1], self.qkv.weight, self.qkv.bias
        query = F.linear(hidden[:, :1], weight[:width], bias[:width])
        kv = F.linear(hidden, weight[width:], bias[width:])
        return *self._split(query, 1), *self._split(kv, 2)

    def _split(self, projected: Tensor, num_parts: int) -> tuple[Tensor, ...]:
        """(B, L, n D) -> n tensors (B, H, L, K)."""
        num_rows, num_tokens, _ = projected.shape
        parts = projected.view(num_rows, num_tokens, num_parts, self.num_heads, -1)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)


class CrossAttention(nn.Module):
    """Post-norm attention from text tokens to all image tokens, CLS included."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.encoder_width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def project(self, image_embeds: Tensor) -> KeyValue:
        """(B, P, D) -> keys and values (B, H, P, K); once per image, whatever the number of texts."""
        num_rows, num_tokens, _ = image_embeds.shape
        kv = self.kv(image_embeds).view(num_rows, num_tokens, 2, self.num_heads, -1)
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(
        self, hidden: Tensor, image_kv: KeyValue, extra_kv: KeyValue | None = None
    ) -> Tensor:
        """(N, L, D) -> (N, L, D); `image_kv` has N rows, or B rows when each image has N / B adjacent texts.

        The tokens of an image's texts then ask it together, so that its keys and values are not copied.
        `extra_kv` has a row for each of the last texts, which `image_kv` then leaves out.
        """
        query = self.query(hidden)
        if extra_kv is None:
            mixed = self._ask(query, image_kv)
        else:
            shared, extra = query.tensor_split([len(query) - len(extra_kv[0])])
            mixed = torch.cat([self._ask(shared, image_kv), self._ask(extra, extra_kv)])
        mixed = dropout(self.output(mixed), self.dropout, self.training)
        normed: Tensor = self.norm(hidden + mixed)
        return normed

    def _ask(self, query: Tensor, image_kv: KeyValue) -> Tensor:
        """(N, L, D) -> (N, L, D): attention of the texts to their images."""
        heads = query.view(len(image_kv[0]), -1, self.num_heads, query.shape[-1] // self.num_heads)
        weight_dropout = self.dropout if self.training else 0.0
        mixed = attend(heads.transpose(1, 2), *image_kv, None, dropout_p=weight_dropout)
        return mixed.transpose(1, 2).reshape(query.shape)


class FeedForward(nn.Module):
    """Post-norm GELU feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.intermediate = nn.Linear(config.width, config.ffn_width)
        self.output = nn.Linear(config.ffn_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        mixed = self.output(F.gelu(self.intermediate(hidden)))
        normed: Tensor = self.norm(hidden + dropout(mixed, self.dropout, self.training))
        return normed


class TextLayer(nn.Module):
    """One layer: self-attention per role; cross-attention and feed-forward shared by both."""

    encoder_attention: SelfAttention
    decoder_attention: SelfAttention
    cross_attention: CrossAttention

    def __init__(self, config: TextConfig, parts: frozenset[Part]) -> None:
        super().__init__()
        if "encoder" in parts:
            self.encoder_attention = SelfAttention(config)
        if "decoder" in parts:
            self.decoder_attention = SelfAttention(config)
        if "cross" in parts:
            self.cross_attention = CrossAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        *,
        mode: Mode,
        image_kv: KeyValue | None,
        extra_kv: KeyValue | None,
        first_only: bool,
    ) -> Tensor:
        """Run one layer in `mode`."""
        attention = self.decoder_attention if mode == "causal" else self.encoder_attention
        hidden = attention(hidden, mask, first_only=first_only)
        if image_kv is not None:
            hidden = self.cross_attention(hidden, image_kv, extra_kv)
        fed: Tensor = self.feed_forward(hidden)
        return fed


class TextTransformer(nn.Module):
    """Word and position embeddings, and a stack of `TextLayer`. No token types, no pooler."""

    def __init__(self, config: TextConfig, parts: Iterable[Part] = ALL_PARTS) -> None:
        """Build the layers with `parts` only: a captioner needs no encoder, a filter no decoder."""
        super().__init__()
        self.config = config
        kept = frozenset(parts)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(TextLayer(config, kept) for _ in range(config.depth))

    def stack(self) -> list[TextLayer]:
        """Return the layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, TextLayer)]

    def project_image(self, image_embeds: Tensor) -> list[KeyValue]:
        """(B, P, D) -> cross-attention keys and values of every layer, to be used many times."""
        return [layer.cross_attention.project(image_embeds) for layer in self.stack()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        mode: Mode,
        image_kv: list[KeyValue] | None = None,
        extra_kv: list[KeyValue] | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """(B, L) ids -> (B, L, D) hidden states, or (B, 1, D) with `first_only`.

        `attention_mask` (B, L) is 1 for real tokens; None means that all are. `image_kv` comes from
        `project_image` and is needed in every mode but "text"; `extra_kv` has the images of the last texts
        where those of `image_kv` are not theirs. `first_only` spares the last layer all tokens but the first,
        for heads that read no other.
        """
        if (mode == "text") != (image_kv is None):
            raise ValueError(f"mode {mode!r} {'reads no' if mode == 'text' else 'needs an'} image")
        num_tokens = input_ids.shape[1]
        positions = torch.arange(num_tokens, device=input_ids.device)
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        hidden = dropout(self.embedding_norm(embedded), self.config.dropout, self.training)
        device = hidden.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # else every layer casts it again
        mask = _attention_mask(attention_mask, num_tokens, mode, input_ids.device)
        for index, layer in enumerate(self.layers):
            kv = image_kv[index] if image_kv is not None else None
            extra = extra_kv[index] if extra_kv is not None else None
            is_last = index == len(self.layers) - 1
            hidden = layer(
                hidden,
                mask,
                mode=mode,
                image_kv=kv,
                extra_kv=extra,
                first_only=first_only and is_last,
            )
        return hidden


class LMHead(nn.Module):
    """BERT's masked-LM head: dense, GELU, LayerNorm, then the word embeddings themselves, and a bias."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.packed: nn.Module | None = None
        """The last matrix as an inference copy of the model packs it."""

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """(..., D) and the embedding matrix (V, D) -> logits (..., V)."""
        normed: Tensor = self.norm(F.gelu(self.dense(hidden)))
        if self.packed is not None:
            logits: Tensor = self.packed(normed)
            return logits
        return F.linear(normed, word_embeddings, self.bias)


def init_bert_weights(module: nn.Module, std: float) -> None:
    """Initialise linear layers and embeddings as BERT does: normal with `std`, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def _attention_mask(
    attention_mask: Tensor | None, num_tokens: int, mode: Mode, device: torch.device
) -> Tensor | None:
    """Return a boolean mask (B or 1, 1, 1 or L, L), True = attend; None when nothing is masked."""
    padding = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if mode != "causal":
        return padding
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None, None]
    return causal if padding is None else causal & padding
