"""Match probabilities of image-text pairs (BLIP, section 3.3: the filter of CapFilt).

Dimension key: B batch, P image tokens, L text tokens, E shared width, N pairs, S image side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_core.config import require
from blip_core.med import MED, select_images
from blip_core.tokenizer import MEDTokenizer, clean_caption, require_vocabulary
from blip_core.transforms import EvalTransform


@dataclass(frozen=True, slots=True)
class PairScore:
    """What the filter says about one image and one text."""

    itm_prob: float | None
    """Probability that they match, in [0, 1]; CapFilt keeps 0.5 and above. None: no matching head."""
    itc_sim: float | None
    """Cosine of their features, in [-1, 1]. None: no features to compare."""


class MEDScorer:
    """Scores texts against images with one model, [ENC] at position 0 as in training."""

    def __init__(
        self,
        model: MED,
        tokenizer: MEDTokenizer,
        device: torch.device | str = "cpu",
        max_text_tokens: int = 35,
        transform: EvalTransform | None = None,
    ) -> None:
        """`transform` defaults to the paper's, at the model's image size."""
        limit = model.config.text.max_positions
        require(
            max_text_tokens <= limit,
            f"max_text_tokens {max_text_tokens} is above text.max_positions {limit}",
        )
        model.require_head("itc", "a scorer")
        model.require_head("itm", "a scorer")
        require_vocabulary(model.config.text, tokenizer)
        self.model, self.tokenizer = model.to(device).eval(), tokenizer
        self.device = torch.device(device)
        self.max_text_tokens = max_text_tokens
        self.transform = transform or EvalTransform(model.config.vision.image_size_px)

    @torch.inference_mode()
    def score(self, pixel_values: Tensor, texts: Sequence[Sequence[str]]) -> list[list[PairScore]]:
        """(B, 3, S, S) and B lists of texts -> B lists of scores; each image is encoded once.

        Texts are cleaned as in training; an empty text or an empty list is allowed.
        """
        require(
            len(pixel_values) == len(texts),
            f"there are {len(pixel_values)} images, but {len(texts)} lists of texts",
        )
        image_embeds = self.model.encode_image(pixel_values.to(self.device))
        rows = [index for index, of_image in enumerate(texts) for _ in of_image]
        flat = [clean_caption(text) for of_image in texts for text in of_image]
        itm_prob, itc_sim = self._score_pairs(image_embeds, rows, flat)
        scores = iter(PairScore(p, s) for p, s in zip(itm_prob, itc_sim, strict=True))
        return [[next(scores) for _ in of_image] for of_image in texts]

    def _score_pairs(
        self, image_embeds: Tensor, rows: list[int], texts: list[str]
    ) -> tuple[list[float], list[float]]:
        """Score N texts against the images that `rows` names."""
        if not texts:
            return [], []
        tokens = self.tokenizer.encode(texts, self.max_text_tokens).to(self.device)
        images = torch.tensor(rows, device=self.device)
        logits = self.model.itm_logits_from_kv(
            select_images(self.model.project_image(image_embeds), images),
            self.tokenizer.encoder_ids(tokens.input_ids),
            tokens.attention_mask,
        )
        itm_prob = logits.double().softmax(dim=-1)[:, 1]
        image_features = self.model.image_features(image_embeds)[images]
        text_features = self.model.text_features(tokens.input_ids, tokens.attention_mask)
        itc_sim = (image_features.double() * text_features.double()).sum(dim=-1).clamp(-1.0, 1.0)
        return itm_prob.tolist(), itc_sim.tolist()
