"""The one settings model: presets, merging, and what of it makes a fingerprint.

A preset is a YAML file in `configs/` (or any path). What the user gives is merged over it field by
field, so `{"preset": "quickstart", "pretrain": {"steps": 50}}` changes one number and nothing else,
from the CLI, from Python and from a deployment's parameters alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError, model_validator

from flows.audit_section import AuditSettings
from flows.compare_section import CompareSettings
from flows.errors import SettingsError
from flows.gate_section import GateSettings, gate_basis
from flows.ingest_section import INGEST_SOURCES, RECHECK_FIELDS, IngestSettings
from flows.sections import (
    CaptionSettings,
    CurateSettings,
    DecideSettings,
    EvaluateSettings,
    MachineSettings,
    ModelSettings,
    ReportSettings,
    ScoreSettings,
    Section,
    WorldSettings,
)
from flows.train_section import TrainSettings
from storage.intake.download_config import AS_BEFORE
from storage.policy_file import explain_absent, read_policy

PRESET_FOLDER = Path(__file__).resolve().parent.parent / "configs"
PRESET_FOLDER_VARIABLE = "BOOTSTRAP_CONFIGS"
LAKE_VARIABLE = "BOOTSTRAP_LAKE"
NOT_IN_FINGERPRINTS = ("preset", "cycle", "machine", "curate", "audit", "compare", "report")
"""Sections that change how or where a run happens, not what it makes."""
INGEST_NOT_IN_FINGERPRINTS = (
    "http_proxy",
    "distributor",
    "processes",
    "threads",
    "stall_timeout_s",
    "max_restarts",
    "slice_rows",
    *RECHECK_FIELDS,
)
CURATE_NOT_IN_FINGERPRINTS = ("batch_size",)
CURATE_ADDED_LATER = ("captioner", "captioner_image_size_px", "scorer", "dtype", "length_penalty")
"""As TRAIN_ADDED_LATER."""
CAPTION_NOT_DECODING = ("batch_size", "captioner", "captioner_image_size_px", "dtype")
EVALUATE_NOT_IN_FINGERPRINTS = ("batch_size", "finetuned")
"""`finetuned` adds models that are measured; the figures of each are the same."""
TRAIN_NOT_IN_FINGERPRINTS = (
    "checkpoint_every_steps",
    "log_every_steps",
    "keep_checkpoints",
    "checkpoint_blocks",
    "max_skipped_in_a_row",
    "peak_flops",
)
TRAIN_ADDED_LATER = (
    "accumulate_steps",
    "fresh_lr_scale",
    "decay_rate",
    "steps_per_epoch",
    "weight_decay_on",
    "teacher_mode",
    "negatives_from",
    "hard_negatives_ramp_steps",
    "compile",
    "cache_vision",
    "captions_per_epoch",
    "source_weights",
    "sql",
    "min_crop_area",
    "swap_sides",
    "dev_share",
    "evaluate_every_steps",
    "patience",
    "best_metric",
)
"""Fields younger than the first lakes: at its default each does what was done before it, and is
left out of fingerprints, so that those lakes stay valid."""


class BootstrapSettings(Section):
    """Everything one cycle needs. Fields that are not given come from `preset`."""

    preset: str | None = "quickstart"
    """Name of a file in configs/ (quickstart, photos, base, large) or a path; null for none."""
    cycle: Literal["full-cycle", "next-round"] = "full-cycle"
    """full-cycle runs (or resumes) round 1; next-round starts from the champion and adds a round."""
    seed: int = 0
    """Seed of every random draw: training, captions, evaluation."""
    machine: MachineSettings = MachineSettings()
    """Where and on what the run happens."""
    world: WorldSettings | None = None
    """A drawn world as the web; null for real lists."""
    ingest: IngestSettings = IngestSettings()
    """What is taken in."""
    model: ModelSettings = ModelSettings()
    """The model that is trained."""
    pretrain: TrainSettings = TrainSettings()
    """Pretraining on the noisy web pairs and the human pairs."""
    captioner: TrainSettings = TrainSettings()
    """Finetuning of the captioner (LM) on the human pairs."""
    filter: TrainSettings = TrainSettings()
    """Finetuning of the filter (ITC + ITM) on the human pairs."""
    retrain: TrainSettings | None = None
    """Training of the new model on the clean set; as pretrain when not given."""
    caption: CaptionSettings = CaptionSettings()
    """How captions are written."""
    score: ScoreSettings = ScoreSettings()
    """How texts are scored."""
    curate: CurateSettings = CurateSettings()
    """How captioning and scoring go over the images."""
    decide: DecideSettings = DecideSettings()
    """Which texts are kept."""
    audit: AuditSettings = AuditSettings()
    """How the filter is audited."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """What is measured."""
    gate: GateSettings = GateSettings()
    """When a challenger is promoted."""
    compare: CompareSettings = CompareSettings()
    """Which policies `bootstrap compare` trains models for."""
    report: ReportSettings = ReportSettings()
    """What the report shows."""

    @model_validator(mode="before")
    @classmethod
    def _merge_over_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", "quickstart")
        if preset is None:
            return given
        return merge(load_preset(str(preset)), {**given, "preset": str(preset)})

    @model_validator(mode="after")
    def _one_web(self) -> BootstrapSettings:
        own = [name for name in INGEST_SOURCES if getattr(self.ingest, name)]
        if self.world is not None and own:
            raise ValueError(
                f"ingest.{own[0]} is given, but preset {self.preset!r} draws a world of its own: add "
                "world: null, or name a preset without a world"
            )
        return self

    @model_validator(mode="after")
    def _ranks_share_batches(self) -> BootstrapSettings:
        ranks = self.machine.train_processes
        for name in ("pretrain", "captioner", "filter", "retrain"):
            section = getattr(self, name)
            if section is not None and section.batch_size % ranks:
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} cannot be shared equally by "
                    f"machine.train_processes {ranks}: use a multiple of it"
                )
        return self

    @model_validator(mode="after")
    def _policy_fits_the_scorer(self) -> BootstrapSettings:
        scorer, policy = self.score.scorer, read_policy(self.decide.policy)
        needed = policy.needed_numbers(policy.params(self.decide.given_params))
        if scorer.startswith(("clip:", "open_clip:")) and "itm_prob" in needed:
            raise ValueError(explain_absent(policy.name, "itm_prob", f"score.scorer {scorer}"))
        return self

    def as_basis(self) -> dict[str, Any]:
        """The settings of the data: what a round may not change half-way."""
        dumped: dict[str, Any] = self.model_dump(mode="json")
        for name in NOT_IN_FINGERPRINTS:
            dumped.pop(name)
        dumped["ingest"] = ingest_basis(self.ingest)
        dumped["caption"], dumped["score"] = curate_basis(self.caption), curate_basis(self.score)
        for name in EVALUATE_NOT_IN_FINGERPRINTS:
            dumped["evaluate"].pop(name)
        dumped["decide"] = decide_basis(self.decide)
        dumped["model"] = model_basis(self.model)
        dumped["gate"] = gate_basis(self.gate)
        for name in ("pretrain", "captioner", "filter", "retrain"):
            section = getattr(self, name)
            dumped[name] = None if section is None else train_basis(section)
        return dumped

    @property
    def retrain_or_pretrain(self) -> TrainSettings:
        """Settings of the retraining; the same steps as pretraining unless given, on rows of its own."""
        return self.retrain or self.pretrain.model_copy(update={"sql": None})

    def with_changes(self, changes: Mapping[str, Any]) -> BootstrapSettings:
        """A copy with nested `changes` merged in and validated again."""
        return parse_settings(merge(self.model_dump(mode="json"), changes))


def ingest_basis(settings: IngestSettings) -> dict[str, Any]:
    """What of the settings of the intake its rows depend on; younger fields only where they change them."""
    dumped = settings.model_dump(mode="json", exclude=set(INGEST_NOT_IN_FINGERPRINTS))
    before = json.loads(json.dumps(AS_BEFORE)) | {"image_sets": [], "safety_threshold": 0.8}
    return {k: v for k, v in dumped.items() if k not in before or v != before[k]}


def train_basis(settings: TrainSettings) -> dict[str, Any]:
    """What of one training's settings its weights depend on."""
    dumped = settings.model_dump(mode="json", exclude=set(TRAIN_NOT_IN_FINGERPRINTS))
    for name in TRAIN_ADDED_LATER:
        if dumped[name] == TrainSettings.model_fields[name].default:
            del dumped[name]
    return dumped


def curate_basis(settings: CaptionSettings | ScoreSettings) -> dict[str, Any]:
    """What of the settings of captioning or scoring its rows depend on."""
    dumped = settings.model_dump(mode="json", exclude=set(CURATE_NOT_IN_FINGERPRINTS))
    for name in set(dumped) & set(CURATE_ADDED_LATER):
        if dumped[name] == type(settings).model_fields[name].default:
            del dumped[name]
    return dumped


def decide_basis(settings: DecideSettings) -> dict[str, Any]:
    """What of the settings of deciding its rows depend on: every parameter of the policy with its value.

    The threshold stands by itself, as it did in the first lakes.
    """
    params: dict[str, Any] = dict(read_policy(settings.policy).params(settings.given_params))
    basis = {"policy": settings.policy, "threshold": params.pop("threshold", None)}
    return basis | ({"params": params} if params else {})


def decoding_fields(settings: CaptionSettings) -> dict[str, Any]:
    """The settings of captioning that are a `CaptionConfig`'s."""
    return settings.model_dump(exclude=set(CAPTION_NOT_DECODING))


def model_basis(settings: ModelSettings) -> dict[str, Any]:
    """What of the model's settings its weights depend on."""
    dumped = settings.model_dump(mode="json")
    younger = ("dropout", "text_depth")  # than the first lakes: see TRAIN_ADDED_LATER
    return {k: value for k, value in dumped.items() if k not in younger or value is not None}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`, mapping by mapping; lists and scalars replace."""
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[name] = merge(below, value)
        else:
            merged[name] = value
    return merged


def preset_path(name: str) -> Path:
    """The file of a preset: a path as it is, or a name looked up in the preset folder."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    folder = Path(os.environ.get(PRESET_FOLDER_VARIABLE, PRESET_FOLDER))
    return folder / f"{name}.yaml"


def load_preset(name: str) -> dict[str, Any]:
    """The content of a preset. Raises SettingsError naming the file and the choices."""
    path = preset_path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise SettingsError(
            f"preset {name!r}: no file {path}; give one of the presets there ({known}) or a path"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise SettingsError(f"{path} is not readable YAML: {err}") from err
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"{path} must hold a mapping of settings, found {type(content).__name__}"
        )
    content.pop("preset", None)
    return content


def parse_settings(given: Mapping[str, Any]) -> BootstrapSettings:
    """Validate settings given as plain data. Raises SettingsError naming every bad field."""
    try:
        return BootstrapSettings.model_validate(dict(given))
    except ValidationError as err:
        raise SettingsError(_explain(err)) from err


def load_settings(
    preset: str | None = "quickstart",
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> BootstrapSettings:
    """Settings from a preset, then nested `changes`, then `a.b=c` overrides (YAML values)."""
    given: dict[str, Any] = {"preset": preset}
    given = merge(given, changes or {})
    for override in overrides:
        given = merge(given, _parse_override(override))
    lake = os.environ.get(LAKE_VARIABLE)
    if lake and "lake" not in given.get("machine", {}):
        given = merge(given, {"machine": {"lake": lake}})
    return parse_settings(given)


def _parse_override(text: str) -> dict[str, Any]:
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise SettingsError(f"--set {text!r}: expected field=value, such as pretrain.steps=200")
    nested: Any = yaml.safe_load(value)
    for name in reversed(dotted.split(".")):
        nested = {name: nested}
    return dict(nested)


def _explain(err: ValidationError) -> str:
    lines = ["the settings were refused:"]
    for problem in err.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {field}: no such setting{_closest(problem['loc'])}")
        else:
            lines.append(f"  {field}: {problem['msg']} (given: {problem.get('input')!r})")
    lines.append("`bootstrap settings --describe` lists every field with its meaning")
    return "\n".join(lines)


def _closest(loc: tuple[int | str, ...]) -> str:
    model: Any = BootstrapSettings
    for part in loc[:-1]:
        field = getattr(model, "model_fields", {}).get(str(part))
        if field is None:
            return ""
        model = _section_of(field.annotation)
    matches = get_close_matches(str(loc[-1]), list(getattr(model, "model_fields", {})), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def describe(model: Any, prefix: str = "") -> list[str]:
    """Every field as `dotted.name: meaning`, sections first named, then opened."""
    lines = []
    for name, field in model.model_fields.items():
        lines.append(f"{prefix}{name}: {field.description or ''}")
        section = _section_of(field.annotation)
        if hasattr(section, "model_fields"):
            lines += describe(section, f"{prefix}{name}.")
    return lines


def _section_of(annotation: Any) -> Any:
    """The pydantic model inside `X`, `X | None` or `tuple[X, ...]`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if hasattr(inner, "model_fields"):
            return inner
    return annotation
