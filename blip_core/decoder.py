"""The image-grounded decoder at work: what it remembers of the rows that it writes, and of the images.

Cross-attention keys and values are computed once an image and never copied for its rows; the memory of
self-attention is taken once. Dimension key: B images, k rows an image, N rows, P image tokens, L new text
tokens, T text tokens so far, D width, H heads, K head width, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip_core.attention import attend
from blip_core.decoding import close_ranks
from blip_core.ragged import places
from blip_core.text import TextLayer

if TYPE_CHECKING:
    from blip_core.med import MED


class MEDDecoder:
    """Reads the next tokens of up to `per_image` rows for each image, and gives the logits after them."""

    def __init__(
        self, model: "MED", image_embeds: Tensor, *, per_image: int = 1, max_tokens: int
    ) -> None:
        """Begin with one row for each of the images (B, P, D); no row will exceed `max_tokens` tokens."""
        self.model, self.text, self.per_image = model, model.text, per_image
        num_images, text = len(image_embeds), model.config.text
        heads = (text.num_heads, text.width // text.num_heads)
        self._image_kv = [_by_head(layer, image_embeds) for layer in self.text.stack()]
        shape = (2, num_images * per_image, heads[0], max_tokens, heads[1])
        self._cache = [image_embeds.new_empty(shape) for _ in self._image_kv]
        self._num_tokens = 0
        self._num_images = num_images
        self._image_of = torch.arange(num_images, device=image_embeds.device)
        self._width = 1
        """Places that each image's keys and values are asked from."""
        self._grid: tuple[Tensor, Tensor] | None = None
        """Image and place of each row; None where rows fill all places in order."""

    def step(self, ids: Tensor) -> Tensor:
        """(N, L) next ids of every row -> logits (N, V) after the last of them."""
        text, num_new = self.text, ids.shape[1]
        start, self._num_tokens = self._num_tokens, self._num_tokens + num_new
        positions = torch.arange(start, self._num_tokens, device=ids.device)
        embedded = text.word_embeddings(ids) + text.position_embeddings(positions)
        hidden = text.embedding_norm(embedded)
        mask = None
        if num_new > 1:
            shape = (num_new, self._num_tokens)
            mask = torch.ones(shape, dtype=torch.bool, device=ids.device).tril(start)[None, None]
        for index, layer in enumerate(text.stack()):
            hidden = self._remember(layer, index, hidden, mask)
            hidden = self._look(layer, index, hidden)
            hidden = layer.feed_forward(hidden)
        logits: Tensor = self.model.lm_head(hidden[:, -1], text.word_embeddings.weight)
        return logits

    def select(self, rows: Tensor) -> None:
        """Go on with `rows` (M,), in this order, repeats allowed; images without a row are let go."""
        present, length = torch.arange(len(rows), device=rows.device), self._num_tokens
        moved = (present != rows).nonzero().squeeze(1)
        for cache in self._cache if len(moved) else ():
            cache[:, moved, :, :length] = cache[:, rows[moved], :, :length]
        self._image_of = self._image_of[rows]
        self._drop_images()
        self._arrange()

    def _drop_images(self) -> None:
        """Close the ranks of the images, moving as few as can be."""
        is_kept = torch.zeros(self._num_images, dtype=torch.bool, device=self._image_of.device)
        is_kept[self._image_of] = True
        order = close_ranks(is_kept)
        if len(order) == self._num_images:
            return
        slots = torch.arange(len(order), device=order.device)
        moved = (slots != order).nonzero().squeeze(1)
        for pair in self._image_kv if len(moved) else ():
            pair[:, moved] = pair[:, order[moved]]
        new_slot = torch.zeros_like(is_kept, dtype=torch.int64)
        new_slot[order] = slots
        self._image_of, self._num_images = new_slot[self._image_of], len(order)

    def _arrange(self) -> None:
        """Give each row its place among the `per_image` of its image."""
        image_of, self._width = self._image_of, self.per_image
        expected = torch.arange(self._num_images, device=image_of.device)
        expected = expected.repeat_interleave(self._width)
        if len(image_of) == len(expected) and torch.equal(image_of, expected):
            self._grid = None
            return
        self._grid = (image_of, places(image_of, self._num_images))

    def _remember(
        self, layer: TextLayer, index: int, hidden: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Self-attention (N, L, D) to all tokens so far."""
        attention, (num_rows, num_new, width) = layer.decoder_attention, hidden.shape
        heads = (attention.num_heads, width // attention.num_heads)
        qkv = attention.qkv(hidden).view(num_rows, num_new, 3, *heads).permute(2, 0, 3, 1, 4)
        stop = self._num_tokens
        memory = self._cache[index][:, :num_rows, :, :stop]
        memory[:, :, :, stop - num_new :] = qkv[1:]
        mixed = attend(qkv[0], memory[0], memory[1], mask)
        mixed = attention.output(mixed.transpose(1, 2).flatten(2))
        normed: Tensor = attention.norm(hidden + mixed)
        return normed

    def _look(self, layer: TextLayer, index: int, hidden: Tensor) -> Tensor:
        """Cross-attention (N, L, D); the rows of an image ask its keys and values together.

        The grid of rows keeps its width when some have ended, so that what the others get does not change.
        """
        attention, (_, num_new, width) = layer.cross_attention, hidden.shape
        key, value = self._image_kv[index][:, : self._num_images]
        query = attention.query(hidden)
        shape = (self._num_images, self._width, num_new, width)
        if self._grid is None:
            grid = query.view(shape)
        else:
            grid = query.new_zeros(shape)
            grid[self._grid] = query
        asked = grid.reshape(
            self._num_images, -1, attention.num_heads, width // attention.num_heads
        )
        mixed = attend(asked.transpose(1, 2), key, value, None).transpose(1, 2).reshape(shape)
        mixed = mixed.view(hidden.shape) if self._grid is None else mixed[self._grid]
        normed: Tensor = attention.norm(hidden + attention.output(mixed))
        return normed


def _by_head(layer: TextLayer, image_embeds: Tensor) -> Tensor:
    """Keys and values (2, B, H, P, K) of the images, each head's in one piece."""
    attention, (num_images, num_tokens, _) = layer.cross_attention, image_embeds.shape
    kv = attention.kv(image_embeds).view(num_images, num_tokens, 2, attention.num_heads, -1)
    by_head: Tensor = kv.permute(2, 0, 3, 1, 4).contiguous()
    return by_head
