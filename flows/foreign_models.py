"""Models that were not trained here, as captioner or scorer of a round: blip:PATH, hf:PATH, clip:PATH, open_clip:PATH.

PATH is a folder or a name on the Hugging Face hub, or for `blip` a `.pth` of its authors. Such a model has a row in
`models` and an id from its weights; its files stay where they are. python:FILE.py:FACTORY is a captioner of the user's
own making (`flows/plugins.py`), whose id is a hash of that file.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from blip_core import (
    MED,
    CaptionConfig,
    Captioner,
    CLIPScorer,
    ForeignCaptioner,
    LoadedModel,
    MEDTokenizer,
    OpenCLIPScorer,
    Scorer,
)
from blip_core.foreign import foreign_model_id, is_pth, processing_id, read_config
from flows import plugins
from flows.errors import SettingsError
from flows.session import Run
from flows.settings import BootstrapSettings
from storage import ModelRef, registry

OWN = "own"
VOCABULARIES = ("tokenizer.json", "vocab.txt")
Role = Literal["foreign_captioner", "foreign_scorer"]


def split(reference: str) -> tuple[str, str]:
    """`clip:PATH` -> its kind and its path; a folder's path is expanded."""
    kind, _, where = reference.partition(":")
    folder = Path(where).expanduser()
    return kind, str(folder) if folder.is_dir() else where


def is_blip(ref: ModelRef) -> bool:
    """Whether a foreign model is a BLIP that our own code runs."""
    return ref.is_foreign and ref.path.startswith("blip:")


def registered(run: Run, role: Role, reference: str) -> ModelRef:
    """The row of a foreign model in this round; its weights are hashed, so a changed model is another one.

    Raises CheckpointError when there is no such model.
    """
    kind, where = split(reference)
    if kind == plugins.KIND:
        return _registered_plugin(run, role, reference, where)
    config: dict[str, Any] = {"reference": reference, "processing_id": _processing_id(where)}
    if kind in ("hf", "clip"):
        config["model_type"] = read_config(where)["model_type"]
    return registry.register_foreign(
        run.lake,
        foreign_model_id(where, of_open_clip=kind == "open_clip"),
        role=role,
        round=run.round,
        reference=reference,
        config=config,
    )


def _registered_plugin(run: Run, role: Role, reference: str, where: str) -> ModelRef:
    return registry.register_foreign(
        run.lake,
        plugins.plugin_id(where),
        role=role,
        round=run.round,
        reference=reference,
        config={"reference": reference},
    )


def require_unchanged(ref: ModelRef) -> None:
    """SettingsError unless the weights of a foreign model are still those that a round recorded."""
    kind, where = split(ref.path)
    now = foreign_model_id(where, of_open_clip=kind == "open_clip")
    if now != ref.model_id:
        raise SettingsError(
            f"{ref.path} has other weights ({now[:8]}) than round {ref.round} worked with ({ref.model_id[:8]}): put "
            "those back"
        )


def load_blip(where: str, settings: BootstrapSettings) -> LoadedModel:
    """A BLIP of transformers, of its authors or of ours, with its own tokenizer or, without one, the settings'.

    Raises SettingsError when neither has a tokenizer, CheckpointError when there is no such model.
    """
    tokenizer, folder = where, Path(where)
    has_none = folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES)
    if has_none or is_pth(where):
        tokenizer = settings.model.tokenizer
        if tokenizer == "train":
            raise SettingsError(
                f"{where} has no tokenizer: give model.tokenizer, such as bert-base-uncased"
            )
    return LoadedModel(
        MED.from_pretrained(where), MEDTokenizer.from_pretrained(tokenizer), model_id=""
    )


def captioner(run: Run, ref: ModelRef, config: CaptionConfig) -> Captioner:
    """What writes captions: an image-to-text model of transformers, or the user's own.

    Raises CheckpointError, ConfigError, SettingsError.
    """
    settings = run.settings.caption
    kind, where = split(ref.path)
    if kind == plugins.KIND:
        return plugins.plugin_captioner(where, config, run.device)
    return ForeignCaptioner(
        where,
        config,
        device=run.device,
        dtype=settings.dtype,
        image_size_px=settings.captioner_image_size_px,
    )


def scorer(run: Run, ref: ModelRef) -> Scorer:
    """What scores texts with a CLIP or a relative. Raises CheckpointError."""
    kind, where = split(ref.path)
    settings = run.settings.score
    if kind == "open_clip":
        return OpenCLIPScorer(where, device=run.device, dtype=settings.dtype)
    return CLIPScorer(where, device=run.device, dtype=settings.dtype)


def basis_fields(ref: ModelRef) -> dict[str, str]:
    """What of a foreign model a part is made of, beside its weights; nothing for a model of ours.

    Not where it lies: a folder that is moved makes the same captions.
    """
    if not ref.is_foreign or split(ref.path)[0] == plugins.KIND:
        return {}  # A plug-in's id covers all that is known of it.
    return {ref.role.removeprefix("foreign_"): _processing_id(split(ref.path)[1])}


@lru_cache(maxsize=8)
def _processing_id(where: str) -> str:
    return processing_id(where)
