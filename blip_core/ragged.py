"""Texts of different lengths in one pass, without padding: linear layers see real tokens only.

Attention alone needs a grid: of each text's tokens for self-attention, of each image's tokens for
cross-attention, so that all texts of an image ask its keys and values together and nothing is copied.

Dimension key: N texts, L tokens of the longest text, T tokens of all texts, B images, Q tokens of all texts of
the image that has most, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blip_core.attention import attend
from blip_core.text import KeyValue, TextLayer, TextTransformer


@dataclass(frozen=True, slots=True)
class Ragged:
    """Where the tokens of N texts lie in grids, and which image each text asks."""

    input_ids: Tensor
    """(T,)"""
    text_of: Tensor
    """(T,) the text of each token."""
    position: Tensor
    """(T,) its place in the text."""
    first: Tensor
    """(N,) each text's first token among the T."""
    mask: Tensor
    """(N, 1, 1, L) bool, True where a text has a token."""

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor) -> "Ragged":
        """Lay out padded texts: (N, L) ids and mask, 1 for the real tokens, which come first."""
        real = attention_mask.bool()
        text_of, position = real.nonzero(as_tuple=True)
        lengths = real.sum(dim=1)
        first = lengths.cumsum(0) - lengths
        return cls(input_ids[real], text_of, position, first, real[:, None, None, :])

    def to_texts(self, flat: Tensor) -> Tensor:
        """(T, D) -> (N, L, D), zero where a text has ended."""
        grid = flat.new_zeros(len(self.first), self.mask.shape[-1], flat.shape[-1])
        grid[self.text_of, self.position] = flat
        return grid


@dataclass(frozen=True, slots=True)
class Asking:
    """Where the tokens that ask lie when those of an image's texts stand together."""

    image_of: Tensor
    """(T,) or (N,)"""
    place: Tensor
    """The same shape: the place among all that ask the image."""
    num_places: int
    """Q"""

    @classmethod
    def of(cls, image_of: Tensor, num_images: int) -> "Asking":
        """Lay out tokens by the image that each of them asks."""
        place = places(image_of, num_images)
        return cls(image_of, place, int(place.max()) + 1)

    def ask(self, layer: TextLayer, hidden: Tensor, image_kv: KeyValue) -> Tensor:
        """(T, D) -> (T, D): cross-attention of one layer."""
        attention, (key, value) = layer.cross_attention, image_kv
        query = attention.query(hidden)
        grid = query.new_zeros(len(key), self.num_places, query.shape[-1])
        grid[self.image_of, self.place] = query
        heads = grid.view(*grid.shape[:2], attention.num_heads, -1).transpose(1, 2)
        mixed = attend(heads, key, value, None).transpose(1, 2).reshape(grid.shape)
        normed: Tensor = attention.norm(hidden + attention.output(mixed[self.image_of, self.place]))
        return normed


def places(image_of: Tensor, num_images: int) -> Tensor:
    """Count each row (N,) among those of its image, from 0 and in order: (N,) images -> (N,) int64."""
    by_image = image_of.argsort(stable=True)
    counts = torch.bincount(image_of, minlength=num_images)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(image_of)
    ranks = torch.arange(len(image_of), device=image_of.device)
    place[by_image] = ranks - starts[image_of[by_image]]
    return place


def first_states(
    text: TextTransformer,
    texts: Ragged,
    image_kv: list[KeyValue] | None = None,
    image_of: Tensor | None = None,
) -> Tensor:
    """Return the last hidden state (N, D) of each text's first token, in evaluation mode.

    Without images as mode "text" of the transformer, with `image_kv` of B images and each text's image (N,) as
    mode "fused".
    """
    hidden = text.word_embeddings(texts.input_ids) + text.position_embeddings(texts.position)
    hidden = text.embedding_norm(hidden)
    all_ask = first_ask = None
    if image_kv is not None and image_of is not None:
        num_images = len(image_kv[0][0])
        all_ask = Asking.of(image_of[texts.text_of], num_images)
        first_ask = Asking.of(image_of, num_images)
    stack = text.stack()
    for index, layer in enumerate(stack):
        is_last = index == len(stack) - 1
        hidden = _self_attention(layer, hidden, texts, first_only=is_last)
        asking = first_ask if is_last else all_ask
        if image_kv is not None and asking is not None:
            hidden = asking.ask(layer, hidden, image_kv[index])
        hidden = layer.feed_forward(hidden)
    states: Tensor = hidden
    return states


def _self_attention(layer: TextLayer, hidden: Tensor, texts: Ragged, *, first_only: bool) -> Tensor:
    """(T, D) -> (T, D), or (N, D) with `first_only`: each text's tokens attend to one another."""
    attention = layer.encoder_attention
    grid = texts.to_texts(attention.qkv(hidden))
    shape = (*grid.shape[:2], 3, attention.num_heads, -1)
    query, key, value = grid.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    if first_only:
        mixed = attend(query[:, :, :1], key, value, texts.mask).transpose(1, 2).flatten(1)
        hidden = hidden[texts.first]
    else:
        mixed = attend(query, key, value, texts.mask).transpose(1, 2).flatten(2)
        mixed = mixed[texts.text_of, texts.position]
    normed: Tensor = attention.norm(hidden + attention.output(mixed))
    return normed
