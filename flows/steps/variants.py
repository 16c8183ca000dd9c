"""Captions of another decoding, and their scores: written by a round's own models, beside its own captions.

A *variant* is such a decoding. Its captions and scores lie in `variant_captions` and `variant_scores`, a part for each
shard as the round's do; nothing of the round is touched.
"""

from __future__ import annotations

import logging
from typing import Any

from blip_core import CaptionConfig
from blip_core.errors import ConfigError
from flows import foreign_models, models, plugins
from flows.errors import MissingInput, SettingsError
from flows.session import Run
from flows.settings import decoding_fields
from flows.steps.curate_shards import Curated, Progress, curate_shards
from flows.steps.shards import web_parts
from storage import ModelRef, layout, list_parts, rounds

logger = logging.getLogger(__name__)

SAMPLED = ("nucleus", "official")
"""Decodings that draw, and so write as many captions of an image as `caption.num_captions` says; the others know one."""


def variants_asked(run: Run) -> tuple[str, ...]:
    """The decodings of `compare.decodings` but for the round's own, whose captions are there.

    Raises:
        SettingsError: the round's captioner does not know one, or its settings do not go with it.
        MissingInput: the lake has no captioner or filter of the round.
    """
    own = run.settings.caption.decoding
    variants = tuple(each for each in run.settings.compare.decodings if each != own)
    for variant in variants:
        _check(run, variant)
    return variants


def write_variant(run: Run, variant: str, on_progress: Progress) -> Curated:
    """Caption every web image of the round by another decoding and score what comes out, or find it done.

    Returns what the last pass over the shards came to. A shard that is committed is found again after a kill. Raises
    Stopped after SIGTERM.
    """
    beside = variant_run(run, variant)
    captioner, scorer = _curators(run)
    passes = (
        [(captioner, scorer)] if run.settings.curate.fused else [(captioner, None), (None, scorer)]
    )
    for number, refs in enumerate(passes):
        curated = curate_shards(beside, *refs, _share(on_progress, number, len(passes)))
    logger.info("round %d: captions of decoding %s are written and scored", run.round, variant)
    return curated


def variant_run(run: Run, variant: str) -> Run:
    """A run whose captions and scores are those of another decoding; all else is as the round itself had it.

    Seed and model section are the round's, whatever the comparison trains with.
    """
    caption = run.settings.caption
    began = rounds.settings_of(run.lake, run.round) or {}
    count = caption.num_captions if variant in SAMPLED else 1
    changes: dict[str, Any] = {"caption": {"decoding": variant, "num_captions": count}}
    changes |= {name: began[name] for name in ("seed", "model") if name in began}
    return Run(run.lake, run.settings.with_changes(changes), run.round, variant)


def require_variant(run: Run, variant: str) -> None:
    """Raises MissingInput when some shard has no captions or no scores of another decoding."""
    for table in ("captions", "scores"):
        table = layout.variant_table(table, variant)
        there = {part.name for part in list_parts(run.lake, table, run.round)}
        wanted = [layout.variant_part(part.name, variant) for part in web_parts(run)]
        if missing := [name for name in wanted if name not in there]:
            raise MissingInput(
                f"{len(missing)} shards have no {table} of round {run.round}, {missing[0]} among them; run "
                f"`bootstrap compare --decodings {variant}` first"
            )


def _share(on_progress: Progress, number: int, passes: int) -> Progress:
    """The progress of one of several passes over the same rows, as a share of them all."""
    return lambda done, total, note: on_progress(number * total + done, passes * total, note)


def _curators(run: Run) -> tuple[ModelRef, ModelRef]:
    """The round's captioner and its filter, as the round recorded them."""
    named = {
        "captioner": run.settings.caption.captioner,
        "filter": run.settings.score.scorer,
    }
    foreign = {"captioner": "foreign_captioner", "filter": "foreign_scorer"}
    found = []
    for role, reference in named.items():
        if reference == foreign_models.OWN:
            found.append(models.require(run, role, run.round))
            continue
        ref = models.require(run, foreign[role], run.round)
        foreign_models.require_unchanged(ref)
        found.append(ref)
    return found[0], found[1]


def _check(run: Run, variant: str) -> None:
    """Refuse what the captioner cannot write, before anything is written."""
    captioner = run.settings.caption.captioner
    kind, _ = foreign_models.split(captioner)
    if kind == plugins.KIND:
        raise SettingsError(
            f"compare.decodings {variant!r}: the captioner of round {run.round} is {captioner}, which decodes as its "
            "own code says; leave compare.decodings out, or compare lakes whose captioners differ"
        )
    if kind == "hf" and variant == "official":
        raise SettingsError(
            f"compare.decodings {variant!r} is that of BLIP's released code, and the captioner of round {run.round} is "
            f"{captioner}: use nucleus, greedy or beam"
        )
    beside = variant_run(run, variant)
    try:
        CaptionConfig(seed=beside.settings.seed, **decoding_fields(beside.settings.caption))
    except ConfigError as err:
        raise SettingsError(
            f"compare.decodings {variant!r} does not go with the caption settings of round {run.round}: {err}"
        ) from err
    _curators(run)
