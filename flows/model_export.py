"""Models of a lake as folders that stand alone: for transformers, or for `MED.from_pretrained`."""

from __future__ import annotations

import logging
from pathlib import Path

from blip_core import LoadedModel, hf, load_model
from blip_core.med import Layout
from flows import models
from flows.errors import MissingInput, SettingsError
from storage import Lake, ModelRef, local_folder, registry, rounds

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, Layout] = {
    "captioner": "hf-captioning",
    "filter": "hf-retrieval",
    "med": "hf-captioning",
}
"""Layout that each role is written in unless another is asked for."""


def export_model(
    lake: Lake, role: str, out: Path, *, round: int | None = None, layout: Layout | None = None
) -> ModelRef:
    """Write a round's model of a role into the folder `out`.

    Without a round it is the lake's champion for `med`, and the latest round's model for the other roles.
    Round 0 has the pretrained `med`.

    Raises:
        MissingInput: the lake has no such round or model.
        ConfigError: the layout cannot hold this model.
    """
    ref = _chosen(lake, role, round)
    loaded = load_model(local_folder(lake, ref))
    trained_with = registry.lineage_of(lake, ref.model_id)["config"]
    write_folder(
        loaded, out, layout or LAYOUTS[role], pixel_stats=trained_with["model"]["pixel_stats"]
    )
    return ref


def _chosen(lake: Lake, role: str, round: int | None) -> ModelRef:
    if role == "med" and round is None:
        return registry.champion(lake) or models.require_in(lake, "med", 0)
    if round == 0:
        return models.require_in(lake, role, 0)
    record = rounds.latest_round(lake) if round is None else rounds.read_round(lake, round)
    if record is None:
        raise MissingInput(
            f"lake {lake.uri} has no round{'' if round is None else f' {round}'}; "
            "`bootstrap rounds` lists those that it has"
        )
    return models.require_in(lake, role, record.round)


def write_folder(loaded: LoadedModel, out: Path, layout: Layout, pixel_stats: str) -> None:
    """Write model, tokenizer and, for transformers, how pictures become pixels."""
    require_free(out)
    heads = loaded.model.config.heads
    dropped = [head for head in heads if layout != "own" and head not in hf.LAYOUTS[layout][1]]
    if dropped:
        logger.warning(
            "%s: layout %s has no place for the heads %s; layout own keeps them",
            out,
            layout,
            ", ".join(dropped),
        )
    mean, std = models.PIXEL_STATS[pixel_stats]
    loaded.model.save_pretrained(
        out, layout, tokenizer=loaded.tokenizer, pixel_mean=mean, pixel_std=std
    )


def require_free(out: Path) -> None:
    """Raise SettingsError when a folder holds a model already."""
    if (out / "config.json").exists():
        raise SettingsError(f"{out} holds a model already; name another folder, or remove it")
