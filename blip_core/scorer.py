"""Match probabilities of image-text pairs (BLIP, section 3.3: the filter of CapFilt).

Dimension key: B batch, P image tokens, L text tokens, E shared width, N pairs, S image side.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.config import require
from blip_core.med import MED
from blip_core.packed import DType, for_inference
from blip_core.ragged import Ragged, first_states
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
        *,
        dtype: DType = "float32",
        compile: bool = False,
        num_cached_texts: int = 100_000,
    ) -> None:
        """`transform` defaults to the paper's, at the model's image size.

        `model` is left as it is, and is copied (see `for_inference`): what trains it further is not seen here. The features of the last `num_cached_texts` different texts are kept (base: 1 KB each).
        """
        limit = model.config.text.max_positions
        require(
            max_text_tokens <= limit,
            f"max_text_tokens {max_text_tokens} is above text.max_positions {limit}",
        )
        require(max_text_tokens >= 2, f"max_text_tokens must be 2 or more, got {max_text_tokens}")
        require(
            num_cached_texts >= 0, f"num_cached_texts must be 0 or more, got {num_cached_texts}"
        )
        model.require_head("itc", "a scorer")
        model.require_head("itm", "a scorer")
        require_vocabulary(model.config.text, tokenizer)
        self.model, self.tokenizer = (
            for_inference(model, device=device, dtype=dtype, compile=compile),
            tokenizer,
        )
        self.max_text_tokens = max_text_tokens
        self.transform = transform or EvalTransform(model.config.vision.image_size_px)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._num_cached_texts = num_cached_texts

    @torch.inference_mode()
    def score(self, pixel_values: Tensor, texts: Sequence[Sequence[str]]) -> list[list[PairScore]]:
        """(B, 3, S, S) and B lists of texts -> B lists of scores.

        Each image is encoded once, and its texts ask one set of keys and values; a text that an image has
        several times is scored once. Texts are cleaned as in training; an empty text or list is allowed.
        """
        require(
            len(pixel_values) == len(texts),
            f"there are {len(pixel_values)} images, but {len(texts)} lists of texts",
        )
        cleaned = [[clean_caption(text) for text in of_image] for of_image in texts]
        pairs = [
            (row, text) for row, of_image in enumerate(cleaned) for text in dict.fromkeys(of_image)
        ]
        if not pairs:
            return [[] for _ in texts]
        found = dict(zip(pairs, self._score_pairs(pixel_values, pairs), strict=True))
        return [[found[row, text] for text in of_image] for row, of_image in enumerate(cleaned)]

    def forget_texts(self) -> None:
        """Forget the features of texts: their last digits depend on what they were first computed beside."""
        self._features.clear()

    def _score_pairs(self, pixel_values: Tensor, pairs: list[tuple[int, str]]) -> list[PairScore]:
        """Score N different pairs of an image and a text."""
        model = self.model
        image_embeds = model.encode_image(pixel_values.to(model.device, model.dtype))
        rows = torch.tensor([row for row, _ in pairs], device=model.device)
        tokens = self.tokenizer.encode([text for _, text in pairs], self.max_text_tokens)
        tokens = tokens.to(model.device)
        ragged = Ragged.of(self.tokenizer.encoder_ids(tokens.input_ids), tokens.attention_mask)
        fused = first_states(model.text, ragged, model.project_image(image_embeds), rows)
        itm_prob = model.itm_head(fused).double().softmax(dim=-1)[:, 1]
        image_features = model.image_features(image_embeds).double()[rows]
        text_features = self._text_features([text for _, text in pairs]).double()
        itc_sim = (image_features * text_features).sum(dim=-1).clamp(-1.0, 1.0)
        return [PairScore(p, s) for p, s in zip(itm_prob.tolist(), itc_sim.tolist(), strict=True)]

    def _text_features(self, texts: list[str]) -> Tensor:
        """Features (N, E) of texts, of which those that came before are remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._features]
        if new:
            tokens = self.tokenizer.encode(new, self.max_text_tokens).to(self.model.device)
            ragged = Ragged.of(tokens.input_ids, tokens.attention_mask)
            projected = self.model.text_proj(first_states(self.model.text, ragged))
            features = F.normalize(projected, dim=-1)
            self._features |= {text: row.clone() for text, row in zip(new, features, strict=True)}
        for text in texts:
            self._features.move_to_end(text)
        stacked = torch.stack([self._features[text] for text in texts])
        while len(self._features) > self._num_cached_texts:
            self._features.popitem(last=False)
        return stacked
