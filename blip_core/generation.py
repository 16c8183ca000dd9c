"""How captions are decoded: the settings, what comes out, and where the draws come from (BLIP, section 3.3).

Sampling draws are a function of (seed, image_id, index, position) only, so neither the order, nor the size, nor
the company of a batch changes a caption.

Dimension key: N captions.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from blip_core.config import require, require_positive

FinishReason = Literal["sep", "length", "nan"]
"""`sep`: the caption ended by itself; `length`: max_new_tokens cut it; `nan`: the model gave no number."""
Decoding = Literal["nucleus", "greedy", "beam", "official"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """How captions are decoded."""

    decoding: Decoding = "nucleus"
    """The paper samples synthetic captions (nucleus) and searches for evaluation (beam). `official` samples as
    the released code's sampler does: repetition penalty 1.1 on prompt and caption, the 50 likeliest tokens, then
    top_p; max_new_tokens and min_new_tokens then count the prompt, its [DEC] included."""
    top_p: float = 0.9
    """Nucleus mass, of the distribution that top_k left."""
    top_k: int = 0
    """Candidates a token is drawn from; 0 is off. The reference silently uses 50."""
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of generated tokens, not of the prompt; the reference uses 1.1."""
    num_beams: int = 3
    length_penalty: float = 1.0
    """A beam's score is its log-probability over length ** length_penalty; more favours long captions."""
    max_new_tokens: int = 20
    """Upper bound on generated tokens, [SEP] counted, prompt not."""
    min_new_tokens: int = 1
    """[SEP] is forbidden before that many tokens."""
    prompt: str = ""
    """What every caption starts from, such as `a picture of`; not part of the caption."""
    num_captions: int = 1
    """Samples per image."""
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("nucleus", "greedy", "beam", "official")
        require(
            self.decoding in known,
            f"decoding must be one of {', '.join(known)}, got {self.decoding!r}",
        )
        require(0.0 < self.top_p <= 1.0, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 (off) or more, got {self.top_k}")
        require_positive(self, "temperature", "repetition_penalty", "num_beams", "max_new_tokens")
        require_positive(self, "num_captions")
        for name in ("temperature", "repetition_penalty", "length_penalty"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be in [0, max_new_tokens], got {self.min_new_tokens}",
        )
        require(
            self.is_sampled or self.num_captions == 1,
            f"{self.decoding} decoding gives one caption, num_captions is {self.num_captions}",
        )
        for name, value in _OFFICIAL.items():
            given = getattr(self, name)
            default = CaptionConfig.__dataclass_fields__[name].default
            require(
                self.decoding != "official" or given in (default, value),
                f"decoding official fixes {name} at {value}, got {given}: leave it out, or use nucleus",
            )

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.decoding in ("nucleus", "official")


_OFFICIAL = {"top_k": 50, "repetition_penalty": 1.1, "temperature": 1.0}


def as_nucleus(config: CaptionConfig, num_prompt_tokens: int) -> CaptionConfig:
    """What `official` comes to with a prompt of that many tokens, [DEC] included; another config as it is."""
    if config.decoding != "official":
        return config
    longest = config.max_new_tokens - num_prompt_tokens
    require(
        longest > 0,
        f"decoding official counts the {num_prompt_tokens} tokens of the prompt in max_new_tokens "
        f"{config.max_new_tokens}: nothing is left, give more",
    )
    return replace(
        config,
        decoding="nucleus",
        top_k=50,
        repetition_penalty=1.1,
        max_new_tokens=longest,
        min_new_tokens=max(0, config.min_new_tokens - num_prompt_tokens),
    )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Decoded ids of a batch of rows, prompt excluded."""

    ids: list[list[int]]
    """Per row, without [SEP]."""
    sum_logprobs: list[float]
    """Log-probability of each caption, [SEP] included where there is one.

    Of greedy and sampled captions under the model after the repetition penalty and without forbidden tokens, but before
    temperature, top_k and top_p; of beams, as transformers has it, under the model as it is, minus penalties."""
    finish_reasons: list[FinishReason]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids that decoding has to know."""

    sep_id: int
    """Ends a caption."""
    forbidden_ids: tuple[int, ...] = ()
    """Never generated: [PAD], [CLS], ..."""

    def blocked(self, num_new: int, config: CaptionConfig) -> list[int]:
        """Return what cannot follow `num_new` generated tokens."""
        too_short = num_new < config.min_new_tokens
        return [*self.forbidden_ids, self.sep_id] if too_short else [*self.forbidden_ids]


def draw_key(seed: int, image_id: str, index: int) -> int:
    """Return the 64-bit key of all draws of one caption."""
    digest = hashlib.sha256(f"{seed}\0{image_id}\0{index}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """Return one draw in [0, 1) per key (N,) uint64 for token `position` (splitmix64)."""
    offset = np.uint64((position + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    mixed = keys + offset
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
