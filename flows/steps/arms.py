"""Arms of a comparison: one policy's texts, one seed, one new model; all else is shared.

An arm is a row of `arms`, committed when its model is trained and measured. Captions, scores, decisions, vocabulary and
human pairs are those of the round, but for captions that another decoding wrote beside it; no round starts from an
arm's model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows import models
from flows.errors import SettingsError
from flows.session import Run
from flows.settings import BootstrapSettings, model_basis, train_basis
from flows.steps.batches import rows_table
from flows.steps.heldout import held_out
from flows.steps.measure_arm import drop_measured, is_measured, measure_arm, measuring_basis
from flows.steps.plan import ALL_OBJECTIVES, TrainPlan
from flows.steps.policy_texts import PolicyTexts, check_variants, policy_texts
from flows.steps.train import train_model
from flows.steps.variants import variants_asked
from storage import (
    ModelRef,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    drop_part,
    list_parts,
    read_part,
    registry,
)
from storage.fingerprint import canonical, explain

logger = logging.getLogger(__name__)

STAGE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One policy with one seed."""

    texts: PolicyTexts
    seed: int
    steps: int
    settings: str
    """What all arms of a comparison share, as JSON."""

    @property
    def name(self) -> str:
        """Of its part in `arms`."""
        return f"{self.texts.generation}-steps-{self.steps}-seed-{self.seed}"

    @property
    def title(self) -> str:
        """For who watches it: policy, decoding of its captions, seed."""
        parts = (self.texts.policy, self.texts.decoding, str(self.seed))
        return " ".join(part for part in parts if part)


def plan_decodings(run: Run) -> tuple[str, ...]:
    """The decodings whose captions `plan_arms` needs beside the round's own (`flows/steps/variants.py` writes them).

    What can be refused without those captions is refused here, before a model writes for hours. Raises as `plan_arms`,
    and SettingsError for a decoding that the round's captioner does not know or no policy looks at.
    """
    asked = run.settings.compare
    variants = variants_asked(run)
    if variants:
        steps = train_settings(run).retrain_or_pretrain.steps
        _refuse_other_settings(run, steps, _shared_settings(run))
        check_variants(run, asked.policies, variants)
    return variants


def plan_arms(run: Run) -> list[Arm]:
    """Decide by every policy on each decoding's captions, and name the arms: all with the first seed, then with the next.

    Raises:
        ConfigError: a policy is unknown or fails.
        SettingsError: a policy keeps nothing, two are the same, or arms of the same steps were made with
            other settings.
        MissingInput: the round has no scores, a decoding no captions, or the lake no held-out pairs.
    """
    asked, steps = run.settings.compare, train_settings(run).retrain_or_pretrain.steps
    shared = _shared_settings(run)
    texts = policy_texts(run, asked.policies, asked.decodings)
    _refuse_other_settings(run, steps, shared)
    seeds = range(run.settings.seed, run.settings.seed + asked.seeds)
    return [
        Arm(texts=of_policy, seed=seed, steps=steps, settings=shared)
        for seed in seeds
        for of_policy in texts
    ]


def _shared_settings(run: Run) -> str:
    """What all arms share, as JSON. Raises SettingsError where rows of their own are set, MissingInput without held-out pairs."""
    own = train_settings(run).retrain_or_pretrain
    if own.sql is not None:
        raise SettingsError(
            "retrain.sql (or pretrain.sql) says what is trained on, but an arm is trained on what its policy "
            "keeps: leave it out, or write the rule as a policy"
        )
    held_out(run)
    return canonical(
        {
            "train": train_basis(own) | {"objectives": list(ALL_OBJECTIVES)},
            "model": model_basis(run.settings.model),
            "tokenizer_of": models.starting_model(run).model_id,
            "measured": measuring_basis(run),
        }
    )


def train_settings(run: Run) -> BootstrapSettings:
    """The run's settings with the steps that each arm trains for."""
    wanted = run.settings.compare.steps
    if wanted is None:
        return run.settings
    own = run.settings.retrain_or_pretrain.model_dump(mode="json")
    return run.settings.with_changes({"retrain": own | {"steps": wanted}})


def run_arm(run: Run, arm: Arm, on_progress: Callable[[int, int, str], None]) -> PartRef:
    """Train and measure an arm, or find it done; its part of `arms`.

    The same call after a kill goes on from the last checkpoint. Without `compare.keep_models` the weights go
    when the figures are there.

    Raises:
        StaleOutput: the arm was made from other texts; names what differs.
    """
    settings = train_settings(run).with_changes({"seed": arm.seed})
    plan = _plan(run, arm, settings)
    basis = basis_of(
        "arm",
        STAGE_VERSION,
        json.loads(arm.settings) | {"seed": arm.seed},
        [arm.texts.trained_on],
    )
    known = committed_part(
        run.lake, "arms", arm.name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    ref = _model_of(run, known)
    if known is None or ref is None or not is_measured(run, ref):
        ref = _twin(run, arm)
        if ref is None:
            ref, _ = train_model(Run(run.lake, settings, run.round), plan, on_progress)
            measure_arm(run, ref)
        table = rows_table("arms", [_row(run, arm, ref)])
        known = commit_part(run.lake, "arms", arm.name, table, round=run.round, basis=basis)
    if not run.settings.compare.keep_models and registry.forget_arm(run.lake, ref):
        logger.info("arm %s: model %s is measured and removed", arm.name, ref.model_id)
    return known


def _plan(run: Run, arm: Arm, settings: BootstrapSettings) -> TrainPlan:
    return TrainPlan(
        name=f"arm-{arm.name}",
        role=registry.ARM,
        round=run.round,
        sql=arm.texts.sql,
        objectives=ALL_OBJECTIVES,
        parent=None,
        tokenizer_of=models.starting_model(run),
        settings=settings.retrain_or_pretrain,
    )


def _row(run: Run, arm: Arm, ref: ModelRef) -> dict[str, Any]:
    texts = arm.texts
    return {
        "round": run.round,
        "policy": texts.policy,
        "params": texts.params,
        "label": texts.label,
        "generation": texts.generation,
        "seed": arm.seed,
        "steps": arm.steps,
        "model_id": ref.model_id,
        "trained_on": texts.trained_on,
        "num_web": texts.num_web,
        "num_synthetic": texts.num_synthetic,
        "num_human": texts.num_human,
        "dropped_web": texts.dropped_web,
        "dropped_synthetic": texts.dropped_synthetic,
        "settings": arm.settings,
        "decoding": texts.decoding,
    }


def _model_of(run: Run, known: PartRef | None) -> ModelRef | None:
    """The model of a committed arm, whether or not its weights are still there."""
    if known is None:
        return None
    model_id = read_part(run.lake, known, ["model_id"]).column(0)[0].as_py()
    path = registry.arm_path(model_id)
    return ModelRef(model_id=model_id, role=registry.ARM, round=run.round, path=path)


def _twin(run: Run, arm: Arm) -> ModelRef | None:
    """The measured model of another arm that was trained on the same texts in the same way, None without one."""
    wanted = {"seed": arm.seed, "trained_on": arm.texts.trained_on, "settings": arm.settings}
    for part in list_parts(run.lake, "arms", run.round):
        row = read_part(run.lake, part, list(wanted)).to_pylist()[0]
        ref = _model_of(run, part)
        if part.name != arm.name and row == wanted and ref is not None and is_measured(run, ref):
            return ref
    return None


def _forget(run: Run, part: PartRef) -> None:
    """Drop an arm with its figures and its model; the row goes first, so that no reader sees half of it."""
    ref = _model_of(run, part)
    assert ref is not None, f"{part.path} names no model"
    drop_part(run.lake, part)
    drop_measured(run, ref)
    registry.forget_arm(run.lake, ref)


def _refuse_other_settings(run: Run, steps: int, shared: str) -> None:
    """Arms that are shown side by side were trained and measured alike; with `on_stale: rebuild`, others go.

    Raises:
        SettingsError: names what differs.
    """
    for part in list_parts(run.lake, "arms", run.round):
        row = read_part(run.lake, part, ["steps", "settings"]).to_pylist()[0]
        if row["steps"] != steps or row["settings"] == shared:
            continue
        if run.on_stale == "rebuild":
            _forget(run, part)
            continue
        differs = explain(json.loads(row["settings"]), json.loads(shared))
        raise SettingsError(
            f"arms of round {run.round} with {steps} steps were made with other settings "
            f"({part.name}): {'; '.join(differs)}; give the old value, compare at another --steps, or run with "
            "--on-stale rebuild to make them all anew"
        )
