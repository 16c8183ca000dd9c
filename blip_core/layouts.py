"""Other people's names for our weights: BLIP's own checkpoints and transformers' (BLIP, section 3.1).

Ours stacks query, key and value, and keeps once what encoder and decoder share. So one tensor of ours may be
several of theirs, and one of theirs may stand in a file twice: an `Entry` says which rows of which tensor.
The same entries read and write.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from blip_core.config import MEDConfig, VisionConfig
from blip_core.errors import CheckpointError, ConfigError
from blip_core.weight_files import listed

Role = Literal["encoder", "decoder"]
ROLE_PREFIX: dict[Role, str] = {"encoder": "text_encoder.", "decoder": "text_decoder.bert."}


class Entry(NamedTuple):
    """One tensor of theirs, and where it is in ours."""

    theirs: str
    ours: str
    block: int = 0
    """Which block of rows of our tensor."""
    num_blocks: int = 1
    """Into how many equal blocks our tensor is cut."""
    is_read: bool = True
    """False: must be in the file, but is only written. We keep no such tensor of its own."""

    def view(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return our tensor's rows; writing to them writes to the model."""
        return own[self.ours].chunk(self.num_blocks)[self.block]


_HF_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


def require_plain_vit(config: VisionConfig, layout: str) -> None:
    """Raise ConfigError when the vision encoder has parts that the layout has no names for."""
    for name, value, plain in (
        ("stem", config.stem, "linear"),
        ("layer_scale", config.layer_scale, None),
    ):
        if value != plain:
            raise ConfigError(
                f"the {layout} layout knows no vision {name} {value!r}, only {plain!r}: "
                "save with layout='own'"
            )


def vision_entries(names: Iterable[str], *, prefix: str, ours: str, hf: bool) -> list[Entry]:
    """Entries of a ViT whose own (timm) names are `names`; BLIP keeps them, transformers renames."""
    entries = []
    for name in names:
        theirs = name
        if hf:
            for pattern, replacement in _HF_VISION:
                theirs = re.sub(pattern, replacement, theirs)
        entries.append(Entry(prefix + theirs, ours + name))
    return entries


def text_entries(
    depth: int, role: Role, *, prefix: str, ours: str = "text.", cross: bool = True
) -> list[Entry]:
    """Entries of one copy of the text transformer, the encoder's or the decoder's."""
    entries = [
        Entry(f"{prefix}embeddings.{table}.weight", f"{ours}{table}.weight")
        for table in ("word_embeddings", "position_embeddings")
    ]
    entries += _linear(f"{prefix}embeddings.LayerNorm", f"{ours}embedding_norm")
    for index in range(depth):
        theirs, own = f"{prefix}encoder.layer.{index}.", f"{ours}layers.{index}."
        entries += attention_entries(theirs + "attention.", f"{own}{role}_attention.")
        if cross:
            entries += cross_entries(theirs + "crossattention.", own + "cross_attention.")
        entries += _linear(theirs + "intermediate.dense", own + "feed_forward.intermediate")
        entries += _linear(theirs + "output.dense", own + "feed_forward.output")
        entries += _linear(theirs + "output.LayerNorm", own + "feed_forward.norm")
    return entries


def attention_entries(theirs: str, ours: str) -> list[Entry]:
    """Entries of one self-attention; ours stacks query, key and value."""
    return [
        *_stacked(theirs + "self.", ("query", "key", "value"), ours + "qkv"),
        *_linear(theirs + "output.dense", ours + "output"),
        *_linear(theirs + "output.LayerNorm", ours + "norm"),
    ]


def cross_entries(theirs: str, ours: str) -> list[Entry]:
    """Entries of one cross-attention; ours stacks key and value."""
    return [
        *_linear(theirs + "self.query", ours + "query"),
        *_stacked(theirs + "self.", ("key", "value"), ours + "kv"),
        *_linear(theirs + "output.dense", ours + "output"),
        *_linear(theirs + "output.LayerNorm", ours + "norm"),
    ]


def head_entries(config: MEDConfig) -> list[Entry]:
    """Entries of the heads that the model has."""
    entries = []
    if "itc" in config.heads:
        entries += [*_linear("vision_proj", "vision_proj"), *_linear("text_proj", "text_proj")]
    if "itm" in config.heads:
        entries += _linear("itm_head", "itm_head")
    if "lm" in config.heads:
        predictions = "text_decoder.cls.predictions."
        entries += [
            *_linear(predictions + "transform.dense", "lm_head.dense"),
            *_linear(predictions + "transform.LayerNorm", "lm_head.norm"),
            Entry(predictions + "bias", "lm_head.bias"),
            Entry(predictions + "decoder.bias", "lm_head.bias"),
            Entry(predictions + "decoder.weight", "text.word_embeddings.weight"),
        ]
    return entries


def med_entries(config: MEDConfig, vision_names: Iterable[str], *, hf: bool) -> list[Entry]:
    """All entries of a model's own weights."""
    prefix = "vision_model." if hf else "visual_encoder."
    entries = vision_entries(vision_names, prefix=prefix, ours="vision.", hf=hf)
    roles: list[Role] = ["encoder"] if config.has_encoder else []
    roles += ["decoder"] if "lm" in config.heads else []
    for role in roles:
        entries += text_entries(
            config.text.depth,
            role,
            prefix=ROLE_PREFIX[role],
            cross=config.has_cross_attention,
        )
    return entries + head_entries(config)


def export_tensors(own: Mapping[str, Tensor], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Return their tensors as views of ours: names that share weights share memory."""
    return {entry.theirs: entry.view(own) for entry in entries}


def import_tensors(
    own: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    entries: Sequence[Entry],
    where: str,
    *,
    twins_needed: bool,
) -> None:
    """Copy `found` into `own`, half precision cast up; everything is checked before anything is copied.

    With `twins_needed` a tensor that stands in the layout twice must be in the file twice; else once is
    enough. Raises CheckpointError listing keys that are absent, unexpected, of another shape, not floating
    point, or tied in the model but different in the file.
    """
    groups: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[(entry.ours, entry.block) if entry.is_read else (entry.theirs, 0)].append(entry)
    absent = sorted(
        entry.theirs
        for group in groups.values()
        for entry in (group if twins_needed else group[:1])
        if entry.theirs not in found
        and (twins_needed or not any(twin.theirs in found for twin in group))
    )
    unexpected = sorted(set(found) - {entry.theirs for entry in entries})
    present = [entry for entry in entries if entry.theirs in found]
    misfits = [_misfit(found[entry.theirs], entry.view(own), entry.theirs) for entry in present]
    problems = {
        "absent": absent,
        "unexpected": unexpected,
        "shape": sorted(filter(None, misfits)),
    }
    _raise_problems(problems, where)
    untied = [
        f"{twin.theirs} and {group[0].theirs}"
        for group in ([e for e in group if e.theirs in found] for group in groups.values())
        for twin in group[1:]
        if not torch.equal(found[twin.theirs], found[group[0].theirs])
    ]
    _raise_problems({"tied in the model but different in the file": untied}, where)
    with torch.no_grad():
        for entry in present:
            if entry.is_read:
                entry.view(own).copy_(found[entry.theirs])


def _misfit(found: Tensor, own: Tensor, name: str) -> str:
    if found.shape != own.shape:
        return f"{name} {tuple(found.shape)} for {tuple(own.shape)}"
    if not found.is_floating_point():
        return f"{name} of {found.dtype}, which is not floating point"
    return ""


def _raise_problems(problems: Mapping[str, list[str]], where: str) -> None:
    texts = [f"{label}: {listed(names)}" for label, names in problems.items() if names]
    if texts:
        raise CheckpointError(f"{where} does not fit the model; {'; '.join(texts)}")


def _linear(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _stacked(prefix: str, names: Sequence[str], ours: str) -> list[Entry]:
    return [
        Entry(f"{prefix}{name}.{part}", f"{ours}.{part}", index, len(names))
        for part in ("weight", "bias")
        for index, name in enumerate(names)
    ]
