"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1).

One vision encoder and one text transformer, which works as a text encoder, as an image-grounded encoder and as
an image-grounded decoder; and the heads of the three objectives.

Dimension key: B batch, P image tokens, L text tokens, D width, E shared width, V vocabulary, N pairs, S side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.config import MEDConfig
from blip_core.text import KeyValue, KVCache, LMHead, TextTransformer, init_bert_weights
from blip_core.vision import build_vision, init_std

INITIAL_TEMPERATURE = 0.07
MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 0.5


class MED(nn.Module):
    """Images and texts to features, match logits and next-token logits."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        self.text = TextTransformer(config.text)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_width)
        self.text_proj = nn.Linear(config.text.width, config.embed_width)
        self.itm_head = nn.Linear(config.text.width, 2)
        self.lm_head = LMHead(config.text)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        for part in (self.text, self.lm_head):
            init_bert_weights(part, std=init_std(config.text.width))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.logit_scale.device

    @property
    def scale(self) -> Tensor:
        """Factor (), 1 / temperature, that multiplies cosines in the contrastive loss."""
        return self.logit_scale.exp()

    def clamp_scale(self) -> None:
        """Keep the temperature in [0.001, 0.5]; called before every training step."""
        low, high = -math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)
        with torch.no_grad():
            self.logit_scale.clamp_(low, high)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> image_embeds (B, P, D), CLS first."""
        image_embeds: Tensor = self.vision.forward_features(pixel_values)
        return image_embeds

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """(B, P, D) -> (B, E), L2-normalised, from CLS."""
        return F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def text_features(self, text_input_ids: Tensor, text_attention_mask: Tensor) -> Tensor:
        """(B, L) ids with [CLS] first -> (B, E), L2-normalised; no image is read."""
        text_embeds = self.text(text_input_ids, text_attention_mask, mode="text")
        return F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)

    def project_image(self, image_embeds: Tensor) -> list[KeyValue]:
        """(B, P, D) -> what cross-attention needs of an image, once for all its texts."""
        return self.text.project_image(image_embeds)

    def itm_logits(
        self, image_embeds: Tensor, encoder_input_ids: Tensor, text_attention_mask: Tensor
    ) -> Tensor:
        """(N, P, D) and (N, L) ids with [ENC] first -> (N, 2), index 1 = match."""
        image_kv = self.project_image(image_embeds)
        return self.itm_logits_from_kv(image_kv, encoder_input_ids, text_attention_mask)

    def itm_logits_from_kv(
        self, image_kv: list[KeyValue], encoder_input_ids: Tensor, text_attention_mask: Tensor
    ) -> Tensor:
        """As `itm_logits`, from `project_image` rows selected by `select_images`."""
        fused_embeds = self.text(
            encoder_input_ids, text_attention_mask, mode="fused", image_kv=image_kv
        )
        logits: Tensor = self.itm_head(fused_embeds[:, 0])
        return logits

    def lm_logits(
        self, image_embeds: Tensor, decoder_input_ids: Tensor, text_attention_mask: Tensor
    ) -> Tensor:
        """(N, P, D) and (N, L) ids with [DEC] first -> (N, L, V), position t predicting token t + 1."""
        image_kv = self.project_image(image_embeds)
        return self.lm_logits_from_kv(image_kv, decoder_input_ids, text_attention_mask)

    def lm_logits_from_kv(
        self,
        image_kv: list[KeyValue],
        decoder_input_ids: Tensor,
        text_attention_mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """As `lm_logits`, from `project_image`; with `cache` the ids are the next tokens only."""
        hidden = self.text(
            decoder_input_ids, text_attention_mask, mode="causal", image_kv=image_kv, cache=cache
        )
        logits: Tensor = self.lm_head(hidden, self.text.word_embeddings.weight)
        return logits


def select_images(image_kv: list[KeyValue], rows: Tensor) -> list[KeyValue]:
    """Pick images by `rows` (N,), repeats allowed, so that N pairs share the B images' projections."""
    return [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in image_kv]


def build_model(config: MEDConfig, *, seed: int) -> MED:
    """Build a model whose random start depends on `seed` only; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MED(config)
