"""BLIP folders of transformers: read any of its three classes, write two of them (BLIP, section 3.1).

transformers splits what we keep as one: BlipForConditionalGeneration is our captioner,
BlipForImageTextRetrieval our filter, and of BlipForQuestionAnswering the vision and the text encoder are a
MED's (its decoder reads the question, not the image). transformers leaves [CLS] where the matching head was
trained with [ENC]: put [ENC] there yourself when you use an exported filter.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip_core.config import Head, MEDConfig, TextConfig, VisionConfig, require
from blip_core.errors import CheckpointError, ConfigError
from blip_core.layouts import export_tensors, import_tensors, med_entries, require_plain_vit
from blip_core.med import MED
from blip_core.tokenizer import MEDTokenizer
from blip_core.training_state import write_synced
from blip_core.transforms import Triple
from blip_core.vision import resize_positions
from blip_core.weight_files import WEIGHTS, FindFile, read_sharded, write_safetensors

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, tuple[str, tuple[Head, ...]]] = {
    "hf-captioning": ("BlipForConditionalGeneration", ("lm",)),
    "hf-retrieval": ("BlipForImageTextRetrieval", ("itc", "itm")),
}
_HEADS_OF: dict[str, tuple[Head, ...]] = {
    **dict(LAYOUTS.values()),
    "BlipForQuestionAnswering": (),
}
_POSITIONS = "vision_model.embeddings.position_embedding"
_NOT_WRITTEN = re.compile(r"^text_decoder\.cls\.predictions\.decoder\.")  # tied, as transformers

# What transformers fills in for a key that config.json leaves out.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 30522,
    "pad_token_id": 0,
    "sep_token_id": 102,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
_SHARED_DEFAULTS: dict[str, Any] = {"image_text_hidden_size": 256, "logit_scale_init_value": 2.6592}


def finder(path_or_repo: str | Path) -> FindFile:
    """Return what finds a model's files by name: in a folder, else on the Hugging Face hub.

    The finder raises CheckpointError when the hub does not know or does not give the model.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return lambda name: folder / name if (folder / name).is_file() else None
    repo = str(path_or_repo)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith("."):
        raise CheckpointError(f"no model at {repo}: there is no such folder")
    return lambda name: _from_hub(repo, name)


def _from_hub(repo: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(repo, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{repo!r} is neither a folder here nor a model that the hub gives ({name}: {err}); "
            "check the path or the name, and that the network may be used (HF_HUB_OFFLINE)"
        ) from err
    return Path(found) if found is not None else None


def load_hf(
    values: Mapping[str, Any], find: FindFile, where: str, *, image_size_px: int | None = None
) -> MED:
    """Build the model of a parsed config.json and read its weights; in evaluation mode.

    Raises CheckpointError for another architecture, and for weights that do not fit.
    """
    config = config_from_hf(values, where)
    target = config if image_size_px is None else config.at_image_size(image_size_px)
    tensors = read_sharded(find, where)
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".position_ids")}
    if not config.heads:  # the decoder of a question answerer does not read images
        tensors = {n: t for n, t in tensors.items() if not n.startswith("text_decoder.")}
    positions = tensors.get(_POSITIONS)
    if target != config and positions is not None:
        wanted = (1, config.vision.num_tokens, config.vision.width)
        if tuple(positions.shape) != wanted:
            raise CheckpointError(
                f"{where} does not fit the model; shape: {_POSITIONS} {tuple(positions.shape)} for "
                f"{wanted}"
            )
        num_patches = target.vision.num_tokens - 1
        tensors[_POSITIONS] = resize_positions(positions.float(), num_patches)
    model = MED(target)
    own = model.state_dict()
    entries = med_entries(target, model.vision.state_dict(), hf=True)
    import_tensors(own, tensors, entries, where, twins_needed=False)
    if "itc" in target.heads and "logit_scale_init_value" in values:
        model.logit_scale.data.fill_(float(values["logit_scale_init_value"]))
    return model.eval()


def require_layout(model: MED, layout: str) -> None:
    """Raise ConfigError when a layout has no names for parts of the model, or the model lacks a head."""
    if layout not in LAYOUTS:
        return  # our own holds every model
    for head in LAYOUTS[layout][1]:
        model.require_head(head, f"layout {layout!r}")
    require_plain_vit(model.config.vision, layout)


def save_hf(model: MED, folder: Path, layout: str, tokenizer: MEDTokenizer | None) -> None:
    """Write config.json and model.safetensors as transformers does.

    Raises ConfigError when the layout has no names for parts of the model, or the model lacks a head.
    """
    architecture, heads = LAYOUTS[layout]
    require_layout(model, layout)
    config = config_to_hf(model, architecture, tokenizer)
    parts = MEDConfig(
        vision=model.config.vision,
        text=model.config.text,
        embed_width=model.config.embed_width,
        heads=heads,
    )
    entries = med_entries(parts, model.vision.state_dict(), hf=True)
    tensors = export_tensors(model.state_dict(), entries)
    tensors = {name: t for name, t in tensors.items() if not _NOT_WRITTEN.match(name)}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def config_from_hf(values: Mapping[str, Any], where: str) -> MEDConfig:
    """Return the configuration that a BLIP config.json describes.

    Raises CheckpointError naming the field for anything that a MED is not.
    """
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    known = ", ".join(_HEADS_OF)
    if model_type != "blip":
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, not 'blip'; its weights are of another model"
        )
    if architectures not in [[name] for name in _HEADS_OF]:
        raise CheckpointError(
            f"{where}: architectures is {architectures}, but must be one of {known}"
        )
    text = _TEXT_DEFAULTS | _section(values, "text_config", where)
    vision = _VISION_DEFAULTS | _section(values, "vision_config", where)
    for section, name, wanted in (
        (text, "hidden_act", "gelu"),
        (vision, "hidden_act", "gelu"),
        (vision, "num_channels", 3),
    ):
        if section[name] != wanted:
            kind = "text_config" if section is text else "vision_config"
            raise CheckpointError(
                f"{where}: {kind}.{name} is {section[name]!r}, but a MED has {wanted!r} only"
            )
    shared = {name: values.get(name, default) for name, default in _SHARED_DEFAULTS.items()}
    _require_numbers(text, _TEXT_DEFAULTS, f"{where}: text_config.")
    _require_numbers(vision, _VISION_DEFAULTS, f"{where}: vision_config.")
    _require_numbers(shared, _SHARED_DEFAULTS, f"{where}: ")
    _warn_of_dropout(text, vision, where)
    try:
        return MEDConfig(
            vision=_vision_from_hf(vision),
            text=_text_from_hf(text, vision["hidden_size"]),
            embed_width=shared["image_text_hidden_size"],
            heads=_HEADS_OF[architectures[0]],
        )
    except ConfigError as err:
        raise CheckpointError(f"{where}: config.json: {err}") from err


def _section(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: config.json has no {name}")
    return section


def _require_numbers(section: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError naming the first field that is not a number of its default's kind."""
    for name, default in defaults.items():
        value = section[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = is_number and isinstance(value, int)
        if isinstance(default, str):
            continue
        if name.endswith("_token_id"):
            is_fine, wanted = value is None or is_whole, "a whole number or null"
        elif isinstance(default, int):
            is_fine, wanted = is_whole and value > 0, "a whole number above 0"
        else:
            is_fine, wanted = is_number and math.isfinite(value), "a number"
        if not is_fine:
            raise CheckpointError(f"{where}{name} is {value!r}, but must be {wanted}")


def _warn_of_dropout(text: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> None:
    """A MED has one dropout, that of the text: say what training will not do."""
    dropout = text["hidden_dropout_prob"]
    others = {
        "text_config.attention_probs_dropout_prob": (text["attention_probs_dropout_prob"], dropout),
        "vision_config.attention_dropout": (vision["attention_dropout"], 0.0),
    }
    for name, (theirs, ours) in others.items():
        if theirs != ours:
            logger.warning("%s: %s is %s; training here uses %s", where, name, theirs, ours)


def _vision_from_hf(vision: Mapping[str, Any]) -> VisionConfig:
    width, ffn_width = vision["hidden_size"], vision["intermediate_size"]
    mlp_ratio = ffn_width / width
    if int(width * mlp_ratio) != ffn_width:  # timm multiplies and cuts
        mlp_ratio = (ffn_width + 0.5) / width
    return VisionConfig(
        image_size_px=vision["image_size"],
        patch_size_px=vision["patch_size"],
        width=width,
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_ratio=mlp_ratio,
        layer_norm_eps=vision["layer_norm_eps"],
    )


def _text_from_hf(text: Mapping[str, Any], encoder_width: int) -> TextConfig:
    ids = {"pad_id": "pad_token_id", "sep_id": "sep_token_id", "dec_id": "bos_token_id"}
    known = {name: text[key] for name, key in ids.items()}
    size = text["vocab_size"]
    return TextConfig(
        vocab_size=size,
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        ffn_width=text["intermediate_size"],
        max_positions=text["max_position_embeddings"],
        encoder_width=encoder_width,
        dropout=text["hidden_dropout_prob"],
        layer_norm_eps=text["layer_norm_eps"],
        # ids that the vocabulary does not have are transformers' defaults, and mean nothing
        **{name: i if i is not None and 0 <= i < size else None for name, i in known.items()},
    )


def config_to_hf(model: MED, architecture: str, tokenizer: MEDTokenizer | None) -> dict[str, Any]:
    """Return config.json for transformers; special ids are the tokenizer's, else the configuration's."""
    text, vision = model.config.text, model.config.vision
    if tokenizer is None:
        pad_id, sep_id, dec_id = (
            text.token_id("pad_id"),
            text.token_id("sep_id"),
            text.token_id("dec_id"),
        )
    else:
        pad_id, sep_id, dec_id = tokenizer.pad_id, tokenizer.sep_id, tokenizer.dec_id
    text_config = {
        "model_type": "blip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "encoder_hidden_size": text.encoder_width,
        "intermediate_size": text.ffn_width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.max_positions,
        "hidden_act": "gelu",
        "layer_norm_eps": text.layer_norm_eps,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.dropout,
        "bos_token_id": dec_id,
        "eos_token_id": sep_id,
        "pad_token_id": pad_id,
        "sep_token_id": sep_id,
    }
    vision_config = {
        "model_type": "blip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "hidden_act": "gelu",
        "layer_norm_eps": vision.layer_norm_eps,
    }
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "blip",
        "image_text_hidden_size": model.config.embed_width,
        "projection_dim": 512,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    if "itc" in model.config.heads:
        config["logit_scale_init_value"] = float(model.logit_scale.detach())
    return config


def save_processor(
    tokenizer: MEDTokenizer, folder: Path, image_size_px: int, mean: Triple, std: Triple
) -> None:
    """Write the files of a BlipProcessor: its tokenizer, and how pictures become pixels."""
    require(len(mean) == len(std) == 3, f"mean and std have three values, got {mean} and {std}")
    tokenizer.save_pretrained(folder)
    special = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "bos_token": "[DEC]",
        "additional_special_tokens": ["[ENC]"],
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "BlipProcessor",
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "BlipProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": image_size_px, "width": image_size_px},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(mean),
            "image_std": list(std),
        },
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_synced(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
