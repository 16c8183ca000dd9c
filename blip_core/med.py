"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1).

One vision encoder and one text transformer, which works as a text encoder, as an image-grounded encoder and as
an image-grounded decoder; and the heads of the three objectives.

Dimension key: B batch, P image tokens, L text tokens, D width, E shared width, V vocabulary, N pairs, S side.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.beam import decode
from blip_core.config import Head, MEDConfig, require
from blip_core.decoder import MEDDecoder
from blip_core.errors import ConfigError
from blip_core.generation import CaptionConfig, Sequences, Vocabulary, as_nucleus
from blip_core.text import KeyValue, LMHead, Part, TextTransformer, init_bert_weights
from blip_core.tokenizer import MEDTokenizer
from blip_core.transforms import CLIP_MEAN, CLIP_STD, Triple
from blip_core.vision import build_vision, init_std

INITIAL_TEMPERATURE = 0.07
MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 0.5

Layout = Literal["own", "hf-captioning", "hf-retrieval"]
_WITH_HEAD: dict[Head, str] = {
    "itc": "a retrieval checkpoint",
    "itm": "a retrieval checkpoint",
    "lm": "a captioning checkpoint",
}


class MED(nn.Module):
    """Images and texts to features, match logits and next-token logits."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        self.text = TextTransformer(config.text, _text_parts(config))
        if "itc" in config.heads:
            self.vision_proj = nn.Linear(config.vision.width, config.embed_width)
            self.text_proj = nn.Linear(config.text.width, config.embed_width)
        if "itm" in config.heads:
            self.itm_head = nn.Linear(config.text.width, 2)
        if "lm" in config.heads:
            self.lm_head = LMHead(config.text)
        if "itc" in config.heads:
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        init_bert_weights(self.text, std=init_std(config.text.width))
        if "lm" in config.heads:
            init_bert_weights(self.lm_head, std=init_std(config.text.width))

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, image_size_px: int | None = None
    ) -> "MED":
        """Load weights, on the CPU, in float32 and in evaluation mode; no tokenizer is needed.

        `path_or_repo` is a folder that `save_pretrained` or `save_model` wrote, a BLIP folder of
        transformers (its `architectures` say which heads there are), a `.pth` file of the BLIP authors, or
        the name of a model on the Hugging Face hub. With `image_size_px` the position embeddings are
        resampled. Raises CheckpointError when weights are absent, damaged or do not fit, all found before
        any compute.
        """
        from blip_core.checkpoints import read_pretrained

        return read_pretrained(path_or_repo, image_size_px=image_size_px)

    def save_pretrained(
        self,
        path: str | Path,
        layout: Layout = "own",
        *,
        tokenizer: MEDTokenizer | None = None,
        pixel_mean: Triple = CLIP_MEAN,
        pixel_std: Triple = CLIP_STD,
    ) -> None:
        """Write the model into the folder `path`, for ourselves or for transformers.

        `own` keeps everything. `hf-captioning` is a BlipForConditionalGeneration (needs the lm head),
        `hf-retrieval` a BlipForImageTextRetrieval (needs itc and itm). With `tokenizer` its files are
        written too, for transformers together with those of a BlipProcessor, which normalises pixels with
        `pixel_mean` and `pixel_std`. Raises ConfigError when the layout cannot hold this model.
        """
        from blip_core.checkpoints import write_pretrained

        write_pretrained(self, path, layout, tokenizer, pixel_mean, pixel_std)

    def require_head(self, head: Head, purpose: str) -> None:
        """Raise ConfigError naming the heads that there are unless `head` is one of them."""
        if head in self.config.heads:
            return
        heads = ", ".join(self.config.heads) or "none"
        raise ConfigError(
            f"{purpose} needs the head {head!r}, but this model has {heads}: "
            f"load {_WITH_HEAD[head]}, or a pretrained model with all three"
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.text.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the parameters."""
        return self.text.word_embeddings.weight.dtype

    @property
    def scale(self) -> Tensor:
        """Factor (), 1 / temperature, that multiplies cosines in the contrastive loss."""
        self.require_head("itc", "the contrastive scale")
        return self.logit_scale.exp()

    def clamp_scale(self) -> None:
        """Keep the temperature in [0.001, 0.5]; called before every training step.

        Does nothing to a model that has none.
        """
        if "itc" not in self.config.heads:
            return
        low, high = -math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)
        with torch.no_grad():
            self.logit_scale.clamp_(low, high)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> image_embeds (B, P, D), CLS first. Raises ConfigError for another S."""
        size = self.config.vision.image_size_px
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ConfigError(
                f"pixel_values are {tuple(pixel_values.shape)}, but must be (B, 3, {size}, {size}): "
                "resize the images, or load the model with another image_size_px"
            )
        image_embeds: Tensor = self.vision.forward_features(pixel_values)
        return image_embeds

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """(B, P, D) -> (B, E), L2-normalised, from CLS."""
        self.require_head("itc", "image_features")
        return F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def text_features(self, text_input_ids: Tensor, text_attention_mask: Tensor) -> Tensor:
        """(B, L) ids with [CLS] first -> (B, E), L2-normalised; no image is read."""
        self.require_head("itc", "text_features")
        self._require_fits(text_input_ids)
        text_embeds = self.text(text_input_ids, text_attention_mask, mode="text", first_only=True)
        return F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)

    def project_image(self, image_embeds: Tensor) -> list[KeyValue]:
        """(B, P, D) -> what cross-attention needs of an image, once for all its texts."""
        return self.text.project_image(image_embeds)

    def itm_logits(
        self, image_embeds: Tensor, encoder_input_ids: Tensor, text_attention_mask: Tensor
    ) -> Tensor:
        """(N, P, D) and (N, L) ids with [ENC] first -> (N, 2), index 1 = match."""
        self.require_head("itm", "itm_logits")
        image_kv = self.project_image(image_embeds)
        return self.itm_logits_from_kv(image_kv, encoder_input_ids, text_attention_mask)

    def itm_logits_from_kv(
        self,
        image_kv: list[KeyValue],
        encoder_input_ids: Tensor,
        text_attention_mask: Tensor,
        *,
        extra_kv: list[KeyValue] | None = None,
    ) -> Tensor:
        """As `itm_logits`, from `project_image` rows selected by `select_images`.

        With B rows for N texts, N a multiple of B, every image has N / B texts that follow each other.
        `extra_kv` (M rows) are the images of M texts more, one each, which come last.
        """
        self.require_head("itm", "itm_logits")
        self._require_fits(encoder_input_ids)
        fused_embeds = self.text(
            encoder_input_ids,
            text_attention_mask,
            mode="fused",
            image_kv=image_kv,
            extra_kv=extra_kv,
            first_only=True,
        )
        logits: Tensor = self.itm_head(fused_embeds[:, 0])
        return logits

    def lm_logits(
        self, image_embeds: Tensor, decoder_input_ids: Tensor, text_attention_mask: Tensor
    ) -> Tensor:
        """(N, P, D) and (N, L) ids with [DEC] first -> (N, L, V), position t predicting token t + 1."""
        self.require_head("lm", "lm_logits")
        image_kv = self.project_image(image_embeds)
        return self.lm_logits_from_kv(image_kv, decoder_input_ids, text_attention_mask)

    def lm_logits_from_kv(
        self,
        image_kv: list[KeyValue],
        decoder_input_ids: Tensor,
        text_attention_mask: Tensor | None,
    ) -> Tensor:
        """As `lm_logits`, from `project_image`."""
        self.require_head("lm", "lm_logits")
        self._require_fits(decoder_input_ids)
        hidden = self.text(decoder_input_ids, text_attention_mask, mode="causal", image_kv=image_kv)
        logits: Tensor = self.lm_head(hidden, self.text.word_embeddings.weight)
        return logits

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        prompt_ids: Sequence[int] | None = None,
        *,
        config: CaptionConfig | None = None,
        sep_id: int | None = None,
        forbidden_ids: Sequence[int] = (),
        image_ids: Sequence[str] | None = None,
    ) -> Sequences:
        """(B, 3, S, S) -> ids of B * num_captions captions, an image's together. `MEDCaptioner` gives texts.

        Every caption starts from `prompt_ids`, [DEC] first (default: [DEC] alone), and ends with `sep_id`;
        both default to the configuration's. `forbidden_ids` are never generated. The draws of nucleus
        sampling follow `image_ids` (default: the row numbers). Raises ConfigError when the model is no
        captioner, an id is not known, or prompt and max_new_tokens exceed max_positions.
        """
        self.require_head("lm", "generate")
        config = CaptionConfig(decoding="greedy") if config is None else config
        require(
            not config.prompt, "prompt is text: give tokenizer.prompt_ids(prompt) as prompt_ids"
        )
        text = self.config.text
        prompt = [text.token_id("dec_id")] if prompt_ids is None else list(prompt_ids)
        sep_id = text.token_id("sep_id") if sep_id is None else sep_id
        require(
            bool(prompt) and all(0 <= token < text.vocab_size for token in [*prompt, sep_id]),
            f"prompt_ids {prompt} and sep_id {sep_id} must be ids below vocab_size {text.vocab_size}",
        )
        require_room(self.config, len(prompt), config)
        names = [str(row) for row in range(len(pixel_values))] if image_ids is None else image_ids
        require(
            len(names) == len(pixel_values),
            f"there are {len(pixel_values)} images, but {len(names)} image_ids",
        )
        if not names:
            return Sequences([], [], [])
        image_embeds = self.encode_image(pixel_values.to(self.device, self.dtype))
        decoder = MEDDecoder(
            self,
            image_embeds,
            per_image=config.num_beams if config.decoding == "beam" else config.num_captions,
            max_tokens=len(prompt) + config.max_new_tokens,
        )
        vocabulary = Vocabulary(sep_id, tuple(forbidden_ids))
        return decode(decoder, prompt, names, config, vocabulary, self.device)

    def _require_fits(self, input_ids: Tensor) -> None:
        """Raise ConfigError for texts longer than the position embeddings."""
        num_tokens, limit = input_ids.shape[1], self.config.text.max_positions
        if num_tokens > limit:
            raise ConfigError(
                f"a text of {num_tokens} tokens is longer than text.max_positions {limit}: cut it"
            )


def require_room(model: MEDConfig, num_prompt_tokens: int, config: CaptionConfig) -> None:
    """Raise ConfigError when a prompt and max_new_tokens exceed the position embeddings."""
    config = as_nucleus(config, num_prompt_tokens)
    longest, limit = num_prompt_tokens + config.max_new_tokens, model.text.max_positions
    require(
        longest <= limit,
        f"prompt and max_new_tokens make {longest} tokens, but text.max_positions is {limit}",
    )


def _text_parts(config: MEDConfig) -> Iterator[Part]:
    if config.has_encoder:
        yield "encoder"
    if "lm" in config.heads:
        yield "decoder"
    if config.has_cross_attention:
        yield "cross"


def select_images(image_kv: list[KeyValue], rows: Tensor) -> list[KeyValue]:
    """Pick images by `rows` (N,), repeats allowed, so that N pairs share the B images' projections."""
    return [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in image_kv]


def build_model(config: MEDConfig, *, seed: int) -> MED:
    """Build a model whose random start depends on `seed` only; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MED(config)
