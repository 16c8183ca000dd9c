"""The baseline: BLIP's pretraining step, made of transformers' classes as the paper's code makes its own.

Dimension key: B images with one text each, L text tokens, P image tokens.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core import Batch, MEDConfig, MEDTokenizer

# isort: split
# After blip_core, which lets transformers import beside a CPU build of torch.
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

MAX_TOKENS = 30


@dataclass(frozen=True)
class Recipe:
    """What both steps do alike."""

    queue_size: int = 57600
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    momentum: float = 0.995
    distill_alpha: float = 0.4
    label_smoothing: float = 0.1
    grad_clip_norm: float | None = 1.0


class PlainBLIP(nn.Module):
    """BLIP's pretraining model, assembled from transformers' classes as the paper's code assembles its own.

    The decoder's embeddings, cross-attention and feed-forward are the encoder's.
    """

    def __init__(self, config: MEDConfig, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        vision, text = config.vision, config.text
        vision_config = BlipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=int(vision.width * vision.mlp_ratio),
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size_px,
            patch_size=vision.patch_size_px,
            layer_norm_eps=vision.layer_norm_eps,
            attention_dropout=0.0,
        )
        text_config = BlipTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            encoder_hidden_size=vision.width,
            intermediate_size=text.ffn_width,
            num_hidden_layers=text.depth,
            num_attention_heads=text.num_heads,
            max_position_embeddings=text.max_positions,
            layer_norm_eps=text.layer_norm_eps,
            hidden_dropout_prob=text.dropout,
            attention_probs_dropout_prob=text.dropout,
            label_smoothing=recipe.label_smoothing,
            is_decoder=True,
            bos_token_id=None,
        )
        self.vision = BlipVisionModel(vision_config)
        self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text_config)
        decoder = self.text_decoder.bert
        self.text_encoder.embeddings = decoder.embeddings
        for mine, shared in zip(
            self.text_encoder.encoder.layer, decoder.encoder.layer, strict=True
        ):
            mine.crossattention, mine.intermediate = shared.crossattention, shared.intermediate
            mine.output = shared.output
        self.vision_proj = nn.Linear(vision.width, config.embed_width)
        self.text_proj = nn.Linear(text.width, config.embed_width)
        self.itm_head = nn.Linear(text.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        online = (self.vision, self.vision_proj, self.text_encoder, self.text_proj)
        self.twins = [
            (part, copy.deepcopy(part).requires_grad_(False).eval()) for part in online
        ]  # a plain list: not trained, and not in parameters()
        queues = F.normalize(torch.randn(2, config.embed_width, recipe.queue_size), dim=1)
        self.register_buffer("image_queue", queues[0])
        self.register_buffer("text_queue", queues[1])
        self.queue_ptr = 0

    def twins_to(self, device: torch.device) -> None:
        """Move the twins, which `to` does not see."""
        for _, twin in self.twins:
            twin.to(device)

    def losses(self, pixel_values: Tensor, ids: Tensor, mask: Tensor, dec: int, enc: int) -> Tensor:
        """Return the three losses (3,) of B images with one text each; the queue grows."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_embeds = self.vision(pixel_values).last_hidden_state
        image_mask = torch.ones(image_embeds.shape[:-1], dtype=torch.long, device=ids.device)
        image_features = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        text_embeds = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        text_features = F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)
        loss_itc, sim_i2t, sim_t2i = self.contrast(
            image_features, text_features, pixel_values, ids, mask
        )
        encoder_ids = ids.clone()
        encoder_ids[:, 0] = enc
        loss_itm = self.match(sim_i2t, sim_t2i, image_embeds, image_mask, encoder_ids, mask)
        decoder_ids = ids.clone()
        decoder_ids[:, 0] = dec
        loss_lm = self.text_decoder(
            decoder_ids,
            attention_mask=mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
            labels=decoder_ids.masked_fill(mask == 0, -100),
        ).loss
        return torch.stack([loss_itc, loss_itm, loss_lm])

    def contrast(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pixel_values: Tensor,
        ids: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC with the twins' soft targets; also the batch's similarities (B, B)."""
        with torch.no_grad():
            for part, twin in self.twins:
                for online, slow in zip(part.parameters(), twin.parameters(), strict=True):
                    slow.mul_(self.recipe.momentum).add_(online, alpha=1 - self.recipe.momentum)
            alpha = self.recipe.distill_alpha
            vision, vision_proj, text, text_proj = (twin for _, twin in self.twins)
            image_slow = F.normalize(vision_proj(vision(pixel_values).last_hidden_state[:, 0]))
            text_slow = F.normalize(
                text_proj(text(ids, attention_mask=mask).last_hidden_state[:, 0])
            )
            images = torch.cat([image_slow.t(), self.image_queue.clone()], dim=1)
            texts = torch.cat([text_slow.t(), self.text_queue.clone()], dim=1)
            known = torch.zeros(len(ids), images.shape[1], device=ids.device).fill_diagonal_(1)
            soft_i2t = F.softmax(image_slow @ texts / self.temp, dim=1)
            soft_t2i = F.softmax(text_slow @ images / self.temp, dim=1)
            targets_i2t = alpha * soft_i2t + (1 - alpha) * known
            targets_t2i = alpha * soft_t2i + (1 - alpha) * known
        sim_i2t = image_features @ texts / self.temp
        sim_t2i = text_features @ images / self.temp
        loss_i2t = -(F.log_softmax(sim_i2t, dim=1) * targets_i2t).sum(1).mean()
        loss_t2i = -(F.log_softmax(sim_t2i, dim=1) * targets_t2i).sum(1).mean()
        slots = slice(self.queue_ptr, self.queue_ptr + len(ids))
        self.image_queue[:, slots], self.text_queue[:, slots] = image_slow.t(), text_slow.t()
        self.queue_ptr = (self.queue_ptr + len(ids)) % self.image_queue.shape[1]
        return (loss_i2t + loss_t2i) / 2, sim_i2t[:, : len(ids)], sim_t2i[:, : len(ids)]

    def match(
        self,
        sim_i2t: Tensor,
        sim_t2i: Tensor,
        image_embeds: Tensor,
        image_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """ITM: one pass over the positives, one over twice as many hard negatives."""
        with torch.no_grad():
            weights_t2i = (F.softmax(sim_t2i.float(), dim=1) + 1e-4).fill_diagonal_(0)
            weights_i2t = (F.softmax(sim_i2t.float(), dim=1) + 1e-4).fill_diagonal_(0)
            images = torch.multinomial(weights_t2i, 1).flatten()
            texts = torch.multinomial(weights_i2t, 1).flatten()
        positive = self.text_encoder(
            ids,
            attention_mask=mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
        ).last_hidden_state
        negative = self.text_encoder(
            torch.cat([ids, ids[texts]]),
            attention_mask=torch.cat([mask, mask[texts]]),
            encoder_hidden_states=torch.cat([image_embeds[images], image_embeds]),
            encoder_attention_mask=torch.cat([image_mask, image_mask]),
        ).last_hidden_state
        logits = self.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
        labels = torch.zeros(len(logits), dtype=torch.long, device=ids.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(logits, labels)


class PlainStep:
    """The baseline's step in one precision at a time."""

    def __init__(
        self,
        model: PlainBLIP,
        tokenizer: MEDTokenizer,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.device = model, tokenizer, recipe, device
        model.to(device).train()
        model.twins_to(device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def __call__(self, batch: Batch, dtype: str, tokens: int | None) -> Tensor:
        """Do one step, texts padded to `tokens` (None: to the batch's longest); returns the losses (3,)."""
        assert batch.pixel_values is not None
        encoded = self.tokenizer.encode(batch.captions, MAX_TOKENS)
        missing = 0 if tokens is None else tokens - encoded.input_ids.shape[1]
        ids = F.pad(encoded.input_ids, (0, missing), value=self.tokenizer.pad_id).to(self.device)
        mask = F.pad(encoded.attention_mask, (0, missing)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            losses = self.model.losses(
                batch.pixel_values.to(self.device),
                ids,
                mask,
                self.tokenizer.dec_id,
                self.tokenizer.enc_id,
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        if self.recipe.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip_norm)
        self.optimizer.step()
        return losses.detach()
