"""The `.pth` checkpoints of BLIP's authors: pretrained, captioner, retrieval and matching (BLIP, section 4.1).

Read without running pickled code, and written. `temp` (a divisor) is our `logit_scale` (a logarithm).
Differences that a file cannot show: their queues carry no text ids, and no image ids when pretraining; and
their momentum text encoder copies cross-attention, which nothing ever reads and we do not keep.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_core.config import Head, MEDConfig, TextConfig, VisionConfig
from blip_core.errors import CheckpointError, ConfigError
from blip_core.layouts import (
    ROLE_PREFIX,
    Entry,
    cross_entries,
    export_tensors,
    import_tensors,
    med_entries,
    require_plain_vit,
    text_entries,
    vision_entries,
)
from blip_core.med import MED
from blip_core.momentum import FeatureQueue, MomentumEncoders
from blip_core.vision import resize_positions
from blip_core.weight_files import listed, read_pth

_HEAD_WIDTH = 64
"""Of every attention head that the authors trained."""
_UNSET_ID = -100
"""What their retrieval queue holds where nothing was written yet."""
_QUEUE_NAMES = ("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue")
_POSITIONS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")


@dataclass(frozen=True, slots=True)
class OfficialModel:
    """What a `.pth` file held."""

    model: MED
    momentum: MomentumEncoders | None
    """Momentum encoders and queue, where the file has them."""


def load_official(
    path: str | Path, config: MEDConfig | None = None, *, image_size_px: int | None = None
) -> OfficialModel:
    """Read a checkpoint of the authors, in evaluation mode.

    The heads follow from the keys. Without `config` the shapes follow from the tensors, with attention
    heads of width 64, as all released files have. `config`, or else `image_size_px`, may ask for another
    image size: position embeddings are resampled. Raises CheckpointError listing keys that are too many,
    too few or of another shape, and for files that need pickled code.
    """
    path = Path(path)
    state = _read_state(path)
    heads = _heads_of(state, path)
    inferred = _config_of(state, heads, path) if config is None else config
    inferred = dataclasses.replace(inferred, heads=heads)
    if image_size_px is not None:
        inferred = inferred.at_image_size(image_size_px)
    _resize(state, inferred)
    model = MED(inferred)
    momentum = _momentum_for(model, state, path)
    scale = state.pop("temp", None) if "itc" in heads else None
    queue = {name: state.pop(name) for name in _QUEUE_NAMES if name in state}
    own = _own(model, momentum)
    import_tensors(own, state, _entries(model, momentum), str(path), twins_needed=True)
    if scale is not None:
        if scale.numel() != 1 or not 0.0 < float(scale) < math.inf:
            raise CheckpointError(f"{path}: temp must be one number above 0, got {scale.tolist()}")
        model.logit_scale.data.fill_(-math.log(float(scale)))
    if momentum is not None:
        _fill_queue(momentum.queue, queue, path)
    return OfficialModel(model.eval(), momentum)


def save_official(
    model: MED, path: str | Path, *, momentum: MomentumEncoders | None = None
) -> None:
    """Write `model` as the authors' classes of the same heads save it: {"model": state}.

    All heads make a pretraining file, ("itc", "itm") a retrieval file, ("lm",) a captioner; `momentum` adds
    its encoders and queue. Raises ConfigError for heads or parts that no class of theirs has.
    """
    require_plain_vit(model.config.vision, "official")
    if model.config.heads not in (("itc", "itm", "lm"), ("itc", "itm"), ("lm",)):
        raise ConfigError(
            f"the official layout has no class with heads {', '.join(model.config.heads) or 'none'}: "
            "save with layout='own'"
        )
    state = _official_state(model, momentum)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # clones of views: torch.save writes a view's whole memory
    plain = {name: state[name].detach().cpu().clone() for name in sorted(state)}
    temporary = path.with_name(f"_tmp-{path.name}")
    torch.save({"model": plain}, temporary)
    temporary.replace(path)


def _official_state(model: MED, momentum: MomentumEncoders | None) -> dict[str, Tensor]:
    """Return the state dictionary of the authors' class, as views of ours."""
    state = export_tensors(_own(model, momentum), _entries(model, momentum))
    positions = torch.arange(model.config.text.max_positions)[None]
    for prefix in _text_prefixes(model, momentum):
        state[f"{prefix}embeddings.position_ids"] = positions
    if "itc" in model.config.heads:
        state["temp"] = (-model.logit_scale.detach().double()).exp().float()
    if momentum is not None:
        state |= _queue_tensors(momentum.queue, is_pretraining="lm" in model.config.heads)
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    values = read_pth(path)
    state = values.get("model")
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} has no 'model', as the checkpoints of BLIP have; it holds "
            f"{listed(sorted(map(str, values)))}"
        )
    wrong = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    if wrong:
        raise CheckpointError(f"{path}: not tensors: {listed(wrong)}")
    return {name: value for name, value in state.items() if not name.endswith(".position_ids")}


def _heads_of(state: Mapping[str, Tensor], path: Path) -> tuple[Head, ...]:
    has_decoder = any(name.startswith("text_decoder.") for name in state)
    heads: list[Head] = []
    if "vision_proj.weight" in state:
        heads.append("itc")
    if "itm_head.weight" in state:
        heads.append("itm")
    if has_decoder:
        heads.append("lm")
    if tuple(heads) not in (("itc", "itm", "lm"), ("itc", "itm"), ("lm",)):
        raise CheckpointError(
            f"{path} is no pretrained model, captioner, retrieval or matching model of BLIP: its heads "
            f"are {', '.join(heads) or 'none'}; its keys begin with {listed(sorted(state))}"
        )
    return tuple(heads)


def _config_of(state: Mapping[str, Tensor], heads: tuple[Head, ...], path: Path) -> MEDConfig:
    """The configuration that shapes tell. Raises CheckpointError when they do not."""
    prefix = ROLE_PREFIX["encoder" if "itc" in heads else "decoder"]
    try:
        patches = state["visual_encoder.patch_embed.proj.weight"]
        positions = state["visual_encoder.pos_embed"]
        words = state[prefix + "embeddings.word_embeddings.weight"]
        places = state[prefix + "embeddings.position_embeddings.weight"]
        ffn = state[prefix + "encoder.layer.0.intermediate.dense.weight"]
        mlp = state["visual_encoder.blocks.0.mlp.fc1.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        depth = _count(state, r"visual_encoder\.blocks\.(\d+)\.")
        vision = VisionConfig(
            image_size_px=math.isqrt(positions.shape[1] - 1) * patch,
            patch_size_px=patch,
            width=width,
            depth=depth,
            num_heads=max(1, width // _HEAD_WIDTH),
            mlp_ratio=len(mlp) / width,
            drop_path=0.1 if depth == 24 else 0.0,  # theirs: ViT-L always, ViT-B never
        )
        text = TextConfig(
            vocab_size=words.shape[0],
            width=words.shape[1],
            depth=_count(state, re.escape(prefix) + r"encoder\.layer\.(\d+)\."),
            num_heads=max(1, words.shape[1] // _HEAD_WIDTH),
            ffn_width=len(ffn),
            max_positions=len(places),
            encoder_width=width,
        )
        embed_width = len(state["vision_proj.weight"]) if "itc" in heads else 256
        return MEDConfig(vision=vision, text=text, embed_width=embed_width, heads=heads)
    except KeyError as err:
        raise CheckpointError(f"{path} does not fit the model; absent: {err.args[0]}") from err
    except (ConfigError, IndexError) as err:
        raise CheckpointError(
            f"{path}: the shapes tell no configuration ({err}): give `config`"
        ) from err


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)


def _resize(state: dict[str, Tensor], config: MEDConfig) -> None:
    for name in _POSITIONS:
        positions = state.get(name)
        if positions is not None and positions.ndim == 3:
            state[name] = resize_positions(positions.float(), config.vision.num_tokens - 1)


def _momentum_for(model: MED, state: Mapping[str, Tensor], path: Path) -> MomentumEncoders | None:
    """Empty momentum encoders where the file has any of theirs."""
    names = [name for name in state if re.match(r"\w+_m\.", name) or name in _QUEUE_NAMES]
    if not names:
        return None
    is_pretraining = "lm" in model.config.heads
    pointers = ["queue_ptr"] if is_pretraining else ["ptr_queue", "idx_queue"]
    wanted = ["image_queue", "text_queue", *pointers]
    absent = sorted(set(wanted) - set(state))
    unexpected = sorted(set(_QUEUE_NAMES) & set(state) - set(wanted))
    if "temp" not in state:
        absent.append("temp")
    problems = [
        f"{label}: {listed(found)}"
        for label, found in (("absent", absent), ("unexpected", unexpected))
        if found
    ]
    if "itc" not in model.config.heads:
        problems = [f"unexpected: {listed(sorted(names))}"]
    if problems:
        raise CheckpointError(f"{path} does not fit the model; {'; '.join(problems)}")
    shape = (model.config.embed_width, state["image_queue"].shape[-1])
    shapes = {
        "image_queue": shape,
        "text_queue": shape,
        "queue_ptr": (1,),
        "ptr_queue": (1,),
        "idx_queue": (1, shape[1]),
    }
    misfits = [
        f"{name} {tuple(state[name].shape)} for {shapes[name]}"
        for name in wanted
        if tuple(state[name].shape) != shapes[name]
    ]
    if misfits:
        raise CheckpointError(f"{path} does not fit the model; shape: {listed(misfits)}")
    return MomentumEncoders(model, shape[1])


def _own(model: MED, momentum: MomentumEncoders | None) -> dict[str, Tensor]:
    own = dict(model.state_dict())
    if momentum is not None:
        own |= {f"momentum.{name}": tensor for name, tensor in momentum.state_dict().items()}
    return own


def _entries(model: MED, momentum: MomentumEncoders | None) -> list[Entry]:
    """Every floating tensor of their state but `temp` and the queues."""
    names = list(model.vision.state_dict())
    entries = med_entries(model.config, names, hf=False)
    if momentum is None:
        return entries
    twin = "text_encoder_m."
    entries += vision_entries(names, prefix="visual_encoder_m.", ours="momentum.vision.", hf=False)
    depth = model.config.text.depth
    entries += text_entries(depth, "encoder", prefix=twin, ours="momentum.text.", cross=False)
    for index in range(depth):
        theirs = f"{twin}encoder.layer.{index}.crossattention."
        crossed = cross_entries(theirs, f"text.layers.{index}.cross_attention.")
        entries += [entry._replace(is_read=False) for entry in crossed]
    return entries + [
        Entry(f"{name}_m.{part}", f"momentum.{name}.{part}")
        for name in ("vision_proj", "text_proj")
        for part in ("weight", "bias")
    ]


def _text_prefixes(model: MED, momentum: MomentumEncoders | None) -> list[str]:
    prefixes = []
    if model.config.has_encoder:
        prefixes.append(ROLE_PREFIX["encoder"])
    if "lm" in model.config.heads:
        prefixes.append(ROLE_PREFIX["decoder"])
    return [*prefixes, "text_encoder_m."] if momentum is not None else prefixes


def _fill_queue(queue: FeatureQueue, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy their queue. Entries without an id get one of their own that no batch has."""
    size = queue.queue_size
    pointer = int(tensors["queue_ptr" if "queue_ptr" in tensors else "ptr_queue"])
    if not 0 <= pointer < size:
        raise CheckpointError(f"{path}: the queue's pointer is {pointer}, but its size {size}")
    nobody = -1 - torch.arange(size)
    image_ids, num_valid = nobody, size
    if "idx_queue" in tensors:
        image_ids = tensors["idx_queue"].flatten().long()
        is_set = image_ids != _UNSET_ID
        num_valid = int(is_set.nonzero().max()) + 1 if bool(is_set.any()) else 0
    for name in ("image_queue", "text_queue"):
        getattr(queue, name).copy_(tensors[name])
    queue.image_ids.copy_(image_ids)
    queue.text_ids.copy_(nobody)
    queue.queue_ptr.fill_(pointer)
    queue.num_valid.fill_(num_valid)


def _queue_tensors(queue: FeatureQueue, *, is_pretraining: bool) -> dict[str, Any]:
    tensors = {"image_queue": queue.image_queue, "text_queue": queue.text_queue}
    pointer = queue.queue_ptr.reshape(1)
    if is_pretraining:
        return {**tensors, "queue_ptr": pointer}
    ids = queue.image_ids.clone()
    ids[int(queue.num_valid) :] = _UNSET_ID
    return {**tensors, "idx_queue": ids[None], "ptr_queue": pointer}
