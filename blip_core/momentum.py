"""Momentum encoders and feature queues of the contrastive loss (BLIP, section 3.2; MoCo; ALBEF).

Dimension key: B batch, P image tokens, L text tokens, E shared width, Q queue length.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.config import require
from blip_core.med import MED
from blip_core.split_tensors import own_part
from blip_core.vision import encode_cls


class FeatureQueue(nn.Module):
    """The last Q momentum features of both sides, with the ids that tell which of them match.

    Starts empty: `num_valid` counts, so that nothing is ever compared with noise. Q need not be a multiple of
    the batch; a batch larger than Q leaves its last Q rows.
    """

    image_queue: Tensor
    text_queue: Tensor
    image_ids: Tensor
    text_ids: Tensor
    queue_ptr: Tensor
    num_valid: Tensor

    def __init__(self, embed_width: int, queue_size: int) -> None:
        super().__init__()
        require(queue_size >= 0, f"queue_size must be 0 or more, got {queue_size}")
        self.queue_size = queue_size
        self.register_buffer("image_queue", torch.zeros(embed_width, queue_size))
        self.register_buffer("text_queue", torch.zeros(embed_width, queue_size))
        self.register_buffer("image_ids", torch.zeros(queue_size, dtype=torch.int64))
        self.register_buffer("text_ids", torch.zeros(queue_size, dtype=torch.int64))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_valid", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(
        self, image_features: Tensor, text_features: Tensor, image_ids: Tensor, text_ids: Tensor
    ) -> None:
        """Write (B, E) features and (B,) ids over the oldest entries."""
        if self.queue_size == 0:
            return
        num_rows = min(len(image_ids), self.queue_size)
        start = int(self.queue_ptr)
        slots = torch.arange(start, start + num_rows, device=image_ids.device) % self.queue_size
        self.image_queue[:, slots] = image_features[-num_rows:].T.to(self.image_queue.dtype)
        self.text_queue[:, slots] = text_features[-num_rows:].T.to(self.text_queue.dtype)
        self.image_ids[slots] = image_ids[-num_rows:]
        self.text_ids[slots] = text_ids[-num_rows:]
        self.queue_ptr.fill_((start + num_rows) % self.queue_size)
        self.num_valid.add_(num_rows).clamp_(max=self.queue_size)

    def similarities(self, features: Tensor, batch: Tensor, side: str) -> Tensor:
        """Return cosines (B, M + valid Q) of features (B, E) with a batch's (M, E), then the queue's.

        `side` says which queue: image or text. In float32, and without a copy of the queue.
        """
        queue = self.image_queue if side == "image" else self.text_queue
        with torch.autocast(features.device.type, enabled=False):
            queued = features.float() @ queue[:, : int(self.num_valid)]
            return torch.cat([features.float() @ batch.float().T, queued], dim=1)

    def is_positive(self, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Return (B, B + valid Q) bool: same image, or same text, as the batch's row."""
        valid = int(self.num_valid)
        all_images = torch.cat([image_ids, self.image_ids[:valid]])
        all_texts = torch.cat([text_ids, self.text_ids[:valid]])
        same_image = image_ids[:, None] == all_images[None, :]
        return same_image | (text_ids[:, None] == all_texts[None, :])


class MomentumEncoders(nn.Module):
    """Slowly following twins of what makes image and text features.

    They run without gradients and without dropout; `mode` "train" leaves dropout and drop path on in them, as
    the released code does. Of the text transformer only what the text mode uses is copied.
    """

    def __init__(
        self, model: MED, queue_size: int, mode: Literal["eval", "train"] = "eval"
    ) -> None:
        super().__init__()
        self.mode = mode
        model.require_head("itc", "momentum encoders")
        self.vision = copy.deepcopy(model.vision)
        self.text = _text_mode_copy(model)
        self.vision_proj = copy.deepcopy(model.vision_proj)
        self.text_proj = copy.deepcopy(model.text_proj)
        self.queue = FeatureQueue(model.config.embed_width, queue_size)
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "MomentumEncoders":
        """Stay in the mode it was made for, whatever is asked."""
        return super().train(self.mode == "train")

    @torch.no_grad()
    def update(self, model: MED, momentum: float) -> None:
        """Move every twin towards the model: p_m = momentum * p_m + (1 - momentum) * p."""
        online = dict(model.named_parameters())
        twins = [(parameter, online[name]) for name, parameter in self.named_parameters()]
        torch._foreach_lerp_(
            [own_part(twin) for twin, _ in twins],
            [own_part(parameter.detach()) for _, parameter in twins],
            1.0 - momentum,
        )

    @torch.no_grad()
    def features(
        self,
        pixel_values: Tensor | None,
        text_input_ids: Tensor,
        text_attention_mask: Tensor,
        image_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return momentum image and text features, (B, E) each, L2-normalised.

        `image_embeds` (B, P, D) in place of pixels spares a pass where vision is frozen, and so equal to its
        twin.
        """
        if image_embeds is None:
            assert pixel_values is not None
            cls_embeds = encode_cls(self.vision, pixel_values)
        else:
            cls_embeds = image_embeds[:, 0]
        text_embeds = self.text(text_input_ids, text_attention_mask, mode="text", first_only=True)
        return (
            F.normalize(self.vision_proj(cls_embeds), dim=-1),
            F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1),
        )


def _text_mode_copy(model: MED) -> nn.Module:
    twin = copy.deepcopy(model.text)
    for layer in twin.layers:
        for part in ("decoder_attention", "cross_attention"):
            if hasattr(layer, part):
                delattr(layer, part)
    return twin
