"""Configurations of the vision encoder, the text transformer and their mixture (BLIP, section 3.1)."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blip_core.errors import ConfigError

BERT_VOCAB_SIZE = 30524
"""bert-base-uncased's 30,522 pieces, [DEC] and [ENC]."""

Head = Literal["itc", "itm", "lm"]
HEADS: tuple[Head, ...] = ("itc", "itm", "lm")


_BERT_IDS = {"pad_id": 0, "sep_id": 102, "dec_id": 30522}


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(config: object, *names: str) -> None:
    """Raise `ConfigError` for the first field of `names` that is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """A ViT as timm builds it."""

    image_size_px: int
    """Side of the square input."""
    patch_size_px: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    stem: Literal["linear", "conv"] = "linear"
    """`linear`: one projection per patch, as in the paper. `conv`: a small stack of strided
    convolutions, which learns about twice as fast when little is trained."""
    drop_path: float = 0.0
    layer_norm_eps: float = 1e-6
    layer_scale: float | None = None
    """Initial LayerScale, for weights that were trained with one (DINOv2: 1e-5)."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size_px", "patch_size_px", "width", "depth", "num_heads")
        require_positive(self, "mlp_ratio", "layer_norm_eps")
        size, patch = self.image_size_px, self.patch_size_px
        require(
            size % patch == 0, f"image_size_px {size} must be a multiple of patch_size_px {patch}"
        )
        require(
            self.width % self.num_heads == 0,
            f"vision width {self.width} must be a multiple of num_heads {self.num_heads}",
        )
        require(self.stem in ("linear", "conv"), f"stem must be linear or conv, got {self.stem!r}")
        require(0.0 <= self.drop_path < 1.0, f"drop_path must be in [0, 1), got {self.drop_path}")
        is_power = patch >= 2 and patch & (patch - 1) == 0
        require(
            self.stem == "linear" or is_power,
            f"a conv stem halves the side each time: patch_size_px must be a power of 2, got {patch}",
        )

    @property
    def num_tokens(self) -> int:
        """Image tokens P: one per patch, and CLS."""
        return (self.image_size_px // self.patch_size_px) ** 2 + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """A BERT-style transformer with cross-attention in every layer."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    ffn_width: int
    max_positions: int
    """Longest text in tokens, special tokens counted."""
    encoder_width: int
    """Width of the image tokens that cross-attention reads."""
    dropout: float = 0.1
    """Of hidden states and of attention weights."""
    layer_norm_eps: float = 1e-12
    pad_id: int | None = None
    """Id of [PAD]. None, here and below: the one of bert-base-uncased where the vocabulary is BERT's."""
    sep_id: int | None = None
    """Id of [SEP], which ends a text."""
    dec_id: int | None = None
    """Id of [DEC], which a caption starts from."""

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "width", "depth", "num_heads", "ffn_width")
        require_positive(self, "max_positions", "encoder_width", "layer_norm_eps")
        require(
            self.width % self.num_heads == 0,
            f"text width {self.width} must be a multiple of num_heads {self.num_heads}",
        )
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        for name in _BERT_IDS:
            token_id = getattr(self, name)
            is_known = token_id is None or 0 <= token_id < self.vocab_size
            require(is_known, f"{name} {token_id} must be below vocab_size {self.vocab_size}")

    def token_id(self, name: Literal["pad_id", "sep_id", "dec_id"]) -> int:
        """Return a special id: the configured one, or BERT's. Raises ConfigError when neither is known."""
        token_id = getattr(self, name)
        if token_id is None:
            require(
                self.vocab_size == BERT_VOCAB_SIZE,
                f"{name} is not known for a vocabulary of {self.vocab_size}: "
                "give the tokenizer, or set it in the text configuration",
            )
            token_id = _BERT_IDS[name]
        return int(token_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class MEDConfig:
    """The multimodal mixture of encoder-decoder."""

    vision: VisionConfig
    text: TextConfig
    embed_width: int = 256
    """Width E of the space in which image and text features are compared."""
    heads: tuple[Head, ...] = HEADS
    """What the model can do: `itc` (features), `itm` (match logits), `lm` (captions). A captioner is
    ("lm",), a filter ("itc", "itm"). Empty: image tokens and the image-grounded encoder alone."""

    def __post_init__(self) -> None:
        require_positive(self, "embed_width")
        unknown = sorted(set(self.heads) - set(HEADS))
        require(
            not unknown, f"heads must be of {', '.join(HEADS)}; got {', '.join(map(str, unknown))}"
        )
        ordered = tuple(head for head in HEADS if head in self.heads)
        object.__setattr__(
            self, "heads", ordered
        )  # frozen: one order, and a tuple from JSON's list
        require(
            self.text.encoder_width == self.vision.width,
            f"text.encoder_width {self.text.encoder_width} must equal vision.width {self.vision.width}",
        )

    @property
    def has_encoder(self) -> bool:
        """Whether the text transformer has the encoder's self-attention."""
        return self.heads != ("lm",)

    @property
    def has_cross_attention(self) -> bool:
        """Whether texts can look at images: all but a model that only compares features."""
        return self.heads != ("itc",)

    def at_image_size(self, image_size_px: int) -> "MEDConfig":
        """Return the configuration for square images of another side."""
        vision = dataclasses.replace(self.vision, image_size_px=image_size_px)
        return dataclasses.replace(self, vision=vision)

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        vocab_size: int | None = None,
        image_size_px: int | None = None,
        heads: tuple[Head, ...] = HEADS,
    ) -> "MEDConfig":
        """Return a preset: nano, tiny, small, small_dinov2, base or large.

        `vocab_size` and `image_size_px` replace the preset's own.
        """
        require(name in _PRESETS, f"preset must be one of {', '.join(_PRESETS)}; got {name!r}")
        config = _PRESETS[name]()
        text = config.text
        if vocab_size is not None:
            text = dataclasses.replace(text, vocab_size=vocab_size)
        config = dataclasses.replace(config, text=text, heads=heads)
        return config if image_size_px is None else config.at_image_size(image_size_px)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, as `from_dict` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MEDConfig":
        """Build from nested dictionaries; an unknown or absent key is a ConfigError."""
        values = dict(values)
        if isinstance(values.get("heads"), list):
            values["heads"] = tuple(values["heads"])
        for section, section_class in (("vision", VisionConfig), ("text", TextConfig)):
            if isinstance(values.get(section), Mapping):
                values[section] = from_mapping(section_class, values[section], section)
        built: MEDConfig = from_mapping(cls, values, "model")
        return built


def from_mapping(config_class: Any, values: Mapping[str, Any], where: str) -> Any:
    """Build a config dataclass from a mapping; unknown and absent keys are named."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{where}: unknown {', '.join(unknown)}; known are {', '.join(fields)}")
    absent = sorted(
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    )
    require(not absent, f"{where}: {', '.join(absent)} must be given")
    return config_class(**values)


def _med(vision: VisionConfig, text: dict[str, Any], embed_width: int) -> MEDConfig:
    text_config = TextConfig(encoder_width=vision.width, **text)
    return MEDConfig(vision=vision, text=text_config, embed_width=embed_width)


def _tiny() -> MEDConfig:
    """For tests: builds and runs in milliseconds."""
    vision = VisionConfig(image_size_px=32, patch_size_px=16, width=32, depth=2, num_heads=2)
    text = {"vocab_size": 64, "width": 32, "depth": 2, "num_heads": 2, "ffn_width": 64}
    return _med(vision, {**text, "max_positions": 40}, embed_width=16)


def _nano() -> MEDConfig:
    """For CPUs: learns a world of coloured shapes in a few hundred steps."""
    vision = VisionConfig(
        image_size_px=64, patch_size_px=16, width=128, depth=4, num_heads=4, stem="conv"
    )
    text = {"vocab_size": 512, "width": 128, "depth": 2, "num_heads": 4, "ffn_width": 512}
    return _med(vision, {**text, "max_positions": 40, "dropout": 0.0}, embed_width=64)


def _small() -> MEDConfig:
    """ViT-S/16 and a BERT of six layers and the same width."""
    vision = VisionConfig(image_size_px=224, patch_size_px=16, width=384, depth=12, num_heads=6)
    text = {"vocab_size": BERT_VOCAB_SIZE, "width": 384, "depth": 6, "num_heads": 12}
    return _med(vision, {**text, "ffn_width": 1536, "max_positions": 512}, embed_width=256)


def _small_dinov2() -> MEDConfig:
    """`small` with patches of 14 px and LayerScale, as DINOv2's ViT-S has them."""
    small = _small()
    vision = dataclasses.replace(small.vision, patch_size_px=14, layer_scale=1e-5)
    return dataclasses.replace(small, vision=vision)


_BERT_BASE = {
    "vocab_size": BERT_VOCAB_SIZE,
    "width": 768,
    "depth": 12,
    "num_heads": 12,
    "ffn_width": 3072,
    "max_positions": 512,
}


def _base() -> MEDConfig:
    """The paper's ViT-B/16 and BERT-base."""
    vision = VisionConfig(image_size_px=224, patch_size_px=16, width=768, depth=12, num_heads=12)
    return _med(vision, _BERT_BASE, embed_width=256)


def _large() -> MEDConfig:
    """The paper's ViT-L/16 and BERT-base."""
    vision = VisionConfig(
        image_size_px=224, patch_size_px=16, width=1024, depth=24, num_heads=16, drop_path=0.1
    )
    return _med(vision, _BERT_BASE, embed_width=256)


_PRESETS: dict[str, Callable[[], MEDConfig]] = {
    "nano": _nano,
    "tiny": _tiny,
    "small": _small,
    "small_dinov2": _small_dinov2,
    "base": _base,
    "large": _large,
}
