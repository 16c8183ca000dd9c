"""Ingest: URL lists through img2dataset, human and held-out pairs from their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import MissingInput
from flows.ingest_section import (
    INGEST_SOURCES,
    RECHECK_FIELDS,
    CaptionSetSettings,
    IngestSettings,
    UrlListSettings,
)
from flows.quickstart.server import WorldServer
from flows.quickstart.world import World, WorldConfig, build_world
from flows.safety import safety_of
from flows.session import Run
from flows.settings import BootstrapSettings
from storage import (
    CaptionSetConfig,
    DownloadConfig,
    EmptyInput,
    ImageSetConfig,
    PartRef,
    UrlListConfig,
    adopt_images,
    connect,
    ingest_captions,
    ingest_urls,
)
from storage.canaries import CanaryDraw, draw_canaries

logger = logging.getLogger(__name__)


def ingest_all(run: Run, on_progress: Callable[[int, int], None]) -> list[PartRef]:
    """Take in every list and set of the settings; what the lake has already is not fetched again.

    Raises:
        EmptyInput: nothing to take in, no human pairs, or every URL is dead.
    """
    parts: list[PartRef] = []
    with served_lists(run.settings) as settings:
        if not any(getattr(settings, name) for name in INGEST_SOURCES):
            raise EmptyInput(
                "there is nothing to take in: give ingest.url_lists or ingest.image_sets, ingest.human and "
                "ingest.heldout (see README), or a preset with a world such as quickstart"
            )
        # First, for what it refuses.
        download = download_config(settings, run.settings.machine.device)
        configs = [CaptionSetConfig(**s.model_dump(), pool="human") for s in settings.human]
        configs += [CaptionSetConfig(**s.model_dump(), pool="heldout") for s in settings.heldout]
        for config in configs:
            parts += ingest_captions(run.lake, config, on_stale=run.on_stale)
        audit = run.settings.audit
        draw = CanaryDraw(
            share=audit.canary_share, max_images=audit.max_canary_images, seed=run.settings.seed
        )
        drawn = draw_canaries(run.lake, run.round, draw, on_stale=run.on_stale)
        parts += [drawn] if drawn is not None else []
        for position, url_list in enumerate(settings.url_lists):
            parts += ingest_urls(
                run.lake,
                UrlListConfig(**url_list.model_dump()),
                download,
                round=run.round,
                position=position,
                on_stale=run.on_stale,
                on_progress=on_progress,
            )
        for position, image_set in enumerate(settings.image_sets):
            parts += adopt_images(
                run.lake,
                ImageSetConfig(**image_set.model_dump()),
                download,
                round=run.round,
                position=position,
                on_stale=run.on_stale,
                on_progress=on_progress,
            )
    return parts


def require_sets(run: Run) -> None:
    """Refuse a cycle that could not end, before hours of downloading.

    Raises:
        MissingInput: neither the settings nor the lake have human pairs, or held-out ones.
    """
    settings = run.settings.ingest
    if run.settings.world is not None or not (settings.url_lists or settings.image_sets):
        return
    purposes = {
        "human": "captioner and filter are finetuned on them",
        "heldout": "models are measured and compared on them",
    }
    with connect(run.lake) as connection:
        for pool, purpose in purposes.items():
            known = connection.execute(f"SELECT count(*) FROM {pool}").fetchall()[0][0]
            if not known and not getattr(settings, pool):
                raise MissingInput(
                    f"lake {run.lake.uri} has no {pool} pairs and ingest.{pool} names none: "
                    f"{purpose}; give ingest.{pool} a captions file and the folder of its images"
                )


def download_config(settings: IngestSettings, device: str = "auto") -> DownloadConfig:
    """How the lists of the settings are fetched; a check of pictures runs on `device`."""
    others = {*INGEST_SOURCES, *RECHECK_FIELDS, "safety", "safety_threshold"}
    return DownloadConfig(**settings.model_dump(exclude=others), safety=safety_of(settings, device))


@contextmanager
def served_lists(settings: BootstrapSettings) -> Iterator[IngestSettings]:
    """The ingest settings; with a world in the settings, drawn, served and filled in."""
    if settings.world is None:
        yield settings.ingest
        return
    world = drawn_world(settings)
    with WorldServer(world.folder, slow_seconds=settings.world.slow_seconds) as server:
        yield settings.ingest.model_copy(
            update={
                "url_lists": (
                    UrlListSettings(path=str(world.url_list), source_name_column="source_name"),
                ),
                "human": (_set(world.human_captions, world.human_images, "human"),),
                "heldout": (_set(world.heldout_captions, world.heldout_images, "heldout"),),
                "http_proxy": server.url,
            }
        )


def drawn_world(settings: BootstrapSettings) -> World:
    """The world of the settings, drawn if it is not there yet."""
    assert settings.world is not None
    config = WorldConfig(**settings.world.model_dump(exclude={"folder", "slow_seconds"}))
    return build_world(config, Path(settings.world.folder))


def _set(captions: Path, images: Path, name: str) -> CaptionSetSettings:
    return CaptionSetSettings(captions=str(captions), images=str(images), name=name)
