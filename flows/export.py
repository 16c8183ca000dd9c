"""Models of a lake as folders that stand alone: for transformers, or for `MED.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

from blip_core import LoadedModel, load_model
from blip_core.med import Layout
from flows import models
from flows.errors import MissingInput, SettingsError
from storage import Lake, ModelRef, local_folder, rounds

LAYOUTS: dict[str, Layout] = {
    "captioner": "hf-captioning",
    "filter": "hf-retrieval",
    "med": "hf-captioning",
}
"""Layout that each role is written in unless another is asked for."""


def export_model(
    lake: Lake, role: str, out: Path, *, round: int | None = None, layout: Layout | None = None
) -> ModelRef:
    """Write a round's model of a role into the folder `out`; the latest round when none is given.

    Raises:
        MissingInput: the lake has no such round or model.
        ConfigError: the layout cannot hold this model.
    """
    record = rounds.latest_round(lake) if round is None else rounds.read_round(lake, round)
    if record is None:
        raise MissingInput(
            f"lake {lake.uri} has no round{'' if round is None else f' {round}'}; "
            "`bootstrap rounds` lists those that it has"
        )
    ref = models.require_in(lake, role, record.round)
    loaded = load_model(local_folder(lake, ref))
    write_folder(loaded, out, layout or LAYOUTS[role], record.settings["model"]["pixel_stats"])
    return ref


def write_folder(loaded: LoadedModel, out: Path, layout: Layout, pixel_stats: str) -> None:
    """Write model, tokenizer and, for transformers, how pictures become pixels."""
    require_free(out)
    mean, std = models.PIXEL_STATS[pixel_stats]
    loaded.model.save_pretrained(
        out, layout, tokenizer=loaded.tokenizer, pixel_mean=mean, pixel_std=std
    )


def require_free(out: Path) -> None:
    """Raise SettingsError when a folder holds a model already."""
    if (out / "config.json").exists():
        raise SettingsError(f"{out} holds a model already; name another folder, or remove it")
