"""Models of the lake, loaded once per process."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import cast

from blip_core import (
    MED,
    CaptionConfig,
    Captioner,
    EvalTransform,
    LoadedModel,
    MEDCaptioner,
    MEDScorer,
    Scorer,
    load_model,
)
from blip_core.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from flows import foreign_models
from flows.errors import MissingInput
from flows.session import Run
from flows.settings import decoding_fields
from storage import Lake, ModelRef, local_folder, registry, rounds
from storage.rounds import RoundRecord

Triple = tuple[float, float, float]
PIXEL_STATS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}
COMMANDS = {"med": "pretrain", "captioner": "finetune-captioner", "filter": "finetune-filter"}


@lru_cache(maxsize=3)
def _load(folder: Path, device: str) -> LoadedModel:
    return load_model(folder, device=device)


def load(run: Run, ref: ModelRef) -> LoadedModel:
    """The model of a reference, on the run's device, in eval mode."""
    loaded = _load(local_folder(run.lake, ref), str(run.device))
    loaded.model.eval()
    return loaded


def load_copy(
    run: Run, ref: ModelRef, *, image_size_px: int | None = None, dropout: float | None = None
) -> LoadedModel:
    """A copy to train, apart from the cached one; for another image size or dropout when given."""
    folder = local_folder(run.lake, ref)
    loaded = load_model(folder, device=str(run.device), image_size_px=image_size_px)
    config = loaded.model.config
    if dropout is None or dropout == config.text.dropout:
        return loaded
    text = dataclasses.replace(config.text, dropout=dropout)
    model = MED(dataclasses.replace(config, text=text)).to(run.device)
    model.load_state_dict(loaded.model.state_dict())
    return dataclasses.replace(loaded, model=model.eval())


def captioner_ref(run: Run) -> ModelRef:
    """The model that captions this round: the one that settings name, else the one finetuned in it."""
    named = run.settings.caption.captioner
    if named == foreign_models.OWN:
        return require(run, "captioner", run.round)
    return foreign_models.registered(run, "foreign_captioner", named)


def scorer_ref(run: Run) -> ModelRef:
    """The model that scores this round's texts: the one that settings name, else the filter finetuned in it."""
    named = run.settings.score.scorer
    if named == foreign_models.OWN:
        return require(run, "filter", run.round)
    return foreign_models.registered(run, "foreign_scorer", named)


def judge_ref(run: Run) -> ModelRef:
    """The frozen judge: the lake's first scorer, or the one that settings name.

    Raises:
        MissingInput: no round has scored yet.
    """
    named = run.settings.audit.judge
    if named != "first":
        return foreign_models.registered(run, "foreign_scorer", named)
    first = next(
        (ref for ref in registry.list_models(run.lake) if ref.role in ("filter", "foreign_scorer")),
        None,
    )
    if first is None:
        raise MissingInput(
            f"lake {run.lake.uri} has no filter to be the judge (audit.judge: first); run "
            "`bootstrap finetune-filter` first"
        )
    return first if first.is_foreign else require(run, first.role, first.round)


def finetuned(run: Run) -> list[ModelRef]:
    """The captioner and the filter of this round, those that are finetuned in it."""
    named = {"captioner": run.settings.caption.captioner, "filter": run.settings.score.scorer}
    return [
        require(run, role, run.round) for role, name in named.items() if name == foreign_models.OWN
    ]


def captioner_of(run: Run, ref: ModelRef) -> Captioner:
    """What writes captions with a model, as `caption` of the settings says."""
    settings = run.settings.caption
    config = CaptionConfig(seed=run.settings.seed, **decoding_fields(settings))
    if ref.is_foreign and not foreign_models.is_blip(ref):
        return foreign_models.captioner(run, ref, config)
    loaded = _curator(run, ref)
    captioner = MEDCaptioner(
        loaded.model,
        loaded.tokenizer,
        config,
        run.device,
        eval_transform(run, loaded, quick=True),
        dtype=settings.dtype,
        compile=run.settings.machine.compile,
    )
    return cast("Captioner", captioner)


def scorer_of(run: Run, ref: ModelRef) -> Scorer:
    """What scores texts with a model, as `score` of the settings says."""
    if ref.is_foreign and not foreign_models.is_blip(ref):
        return foreign_models.scorer(run, ref)
    settings, loaded = run.settings.score, _curator(run, ref)
    scorer = MEDScorer(
        loaded.model,
        loaded.tokenizer,
        run.device,
        settings.max_text_tokens,
        eval_transform(run, loaded, quick=True),
        dtype=settings.dtype,
        compile=run.settings.machine.compile,
    )
    return cast("Scorer", scorer)


def _curator(run: Run, ref: ModelRef) -> LoadedModel:
    """The MED of a reference, trained here or elsewhere."""
    if not ref.is_foreign:
        return load(run, ref)
    _, where = foreign_models.split(ref.path)
    return foreign_models.load_blip(where, run.settings)


def pixel_stats(run: Run) -> tuple[Triple, Triple]:
    """Mean and standard deviation of the pixels, as the settings say."""
    return PIXEL_STATS[run.settings.model.pixel_stats]


def eval_transform(run: Run, loaded: LoadedModel, *, quick: bool = False) -> EvalTransform:
    """The transform of images that a model is measured on; the quick one is that of captioning and scoring."""
    mean, std = pixel_stats(run)
    return EvalTransform(loaded.model.config.vision.image_size_px, mean=mean, std=std, quick=quick)


def require(run: Run, role: str, round: int) -> ModelRef:
    """The committed model of a role and round. Raises MissingInput naming the command to run."""
    return require_in(run.lake, role, round)


def starting_model(run: Run) -> ModelRef:
    """The model that this round's captioner and filter are finetuned from, and must be beaten."""
    record = rounds.read_round(run.lake, run.round)
    assert record is not None, f"round {run.round} was never begun"
    return starting_model_of(run.lake, record)


def starting_model_of(lake: Lake, record: RoundRecord) -> ModelRef:
    """Round 1 starts from the pretrained model (round 0); a later round from the champion that it
    found when it began, whatever has been promoted since.
    """
    if record.champion_before is None:
        return require_in(lake, "med", 0)
    return registry.resolve(lake, record.champion_before)


def require_in(lake: Lake, role: str, round: int) -> ModelRef:
    """As `require`, for a lake that is only read."""
    ref = registry.find(lake, role, round)
    if ref is None:
        raise MissingInput(
            f"lake {lake.uri} has no {role} of round {round}; "
            f"run `bootstrap {COMMANDS.get(role, 'run')}` first"
        )
    return ref
