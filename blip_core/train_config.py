"""What a training run does, as one frozen configuration (BLIP, section 4.1; the released code's numbers)."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from blip_core.config import MEDConfig, require, require_positive
from blip_core.objectives import OBJECTIVES, Objective
from blip_core.schedule import DECAY_SCOPES, SCHEDULES, DecayScope, Schedule
from blip_core.sharding import SHARDINGS, Sharding

TeacherMode = Literal["eval", "train"]
NegativesFrom = Literal["rank", "all_ranks"]
BestMode = Literal["min", "max"]

UNCOMPARED = (
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "checkpoint_blocks",
    "sharding",
    "peak_flops",
    "max_skipped_in_a_row",
)
"""Fields that a run may be continued with at another value: they change no weight, but for the order of sums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to train on a batch, and how."""

    objectives: tuple[Objective, ...] = OBJECTIVES
    """Any of itc, itm, lm; their losses are added."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Pairs of one forward pass, shared equally by the ranks; a step sees batch_size * accumulate_steps."""
    accumulate_steps: int = 1
    """Micro-batches of one optimizer step.

    ITC and ITM compare within each micro-batch (and the queue); the teacher moves once a step, and the queue
    takes the features of all micro-batches once the step is accepted. LM weighs every token alike, as one
    large batch would.
    """
    learning_rate: float = 3e-4
    """Peak, reached after warm-up."""
    fresh_lr_scale: float = 1.0
    """Factor of the learning rate of cross-attention and heads, which start from random weights where the rest
    starts from a ViT and a BERT."""
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Schedule = "cosine"
    decay_rate: float = 0.9
    """Factor of step_decay and epoch_decay (released code 0.9; the paper's text says 0.85)."""
    steps_per_epoch: int | None = None
    """Optimizer steps of one epoch; epoch_decay needs it."""
    weight_decay: float = 0.05
    weight_decay_on: DecayScope = "matrices"
    """`matrices` spares biases, norms, positions and the scale; `all` is the released code's."""
    adam_beta2: float = 0.999
    """AdamW's memory of squared gradients. 0.98 suits runs of a few hundred steps."""
    grad_clip_norm: float | None = 1.0
    """Largest gradient norm; None leaves gradients as they are."""
    label_smoothing: float = 0.1
    """Of the language-modelling loss. 0 with a vocabulary of a few dozen words."""
    distill_alpha: float = 0.4
    """Weight of the momentum encoders' soft targets in the contrastive loss."""
    alpha_ramp_steps: int = 0
    """Steps over which distill_alpha grows from 0."""
    momentum: float = 0.995
    """Of the momentum encoders, per step."""
    teacher_mode: TeacherMode = "eval"
    """`train` leaves dropout and drop path on in the momentum encoders, as the released code does."""
    queue_size: int = 57600
    """Momentum features kept as further candidates of the contrastive loss."""
    negatives_from: NegativesFrom = "rank"
    """Where hard negatives of ITM come from when several ranks train: the rank's own batch, or all."""
    hard_negatives_ramp_steps: int = 0
    """Steps over which negatives of ITM go from even draws to draws by similarity; 0 is the paper's, from the
    first step. In a run of a few hundred steps hard negatives can hold ITM at its constant answer."""
    prompt: str = ""
    """Put before every caption of the language-modelling objective; not supervised."""
    max_text_tokens: int = 30
    """Special tokens counted, prompt excluded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters stay float32."""
    compile: bool = False
    """Compile the vision blocks with torch.compile; needs a C++ compiler or CUDA."""
    checkpoint_blocks: int = 0
    """Last vision blocks whose activations are computed again in backward, to save memory."""
    sharding: Sharding = "none"
    """With several ranks: `full` splits weights, gradients, optimizer state and momentum encoders over them (FSDP2),
    `none` keeps all on every rank (DistributedDataParallel). Checkpoints are the same."""
    seed: int = 0
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2
    """Last checkpoints that are kept."""
    log_every_steps: int = 20
    evaluate_every_steps: int | None = None
    """Steps between two calls of the run's `evaluate`; None evaluates at the end only."""
    best_metric: str | None = None
    """Name of an evaluated number by which the best model is kept; the run ends with that model."""
    best_mode: BestMode = "min"
    """Whether a smaller or a larger best_metric is better."""
    patience: int | None = None
    """Evaluations in a row without a better best_metric after which the run stops; None never stops."""
    max_skipped_in_a_row: int = 10
    """Steps in a row that may be left out because they are not finite."""
    peak_flops: float | None = None
    """Floating-point operations a second that one device could do, for `mfu`; known for some GPUs."""
    freeze: tuple[str, ...] = ()
    """Prefixes of parameter names that are not trained, such as `vision`."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "accumulate_steps", "learning_rate")
        require_positive(self, "fresh_lr_scale")
        require_positive(self, "checkpoint_every_steps", "log_every_steps", "keep_checkpoints")
        known = set(self.objectives) <= set(OBJECTIVES) and len(self.objectives) > 0
        require(known, f"objectives must be some of {', '.join(OBJECTIVES)}; got {self.objectives}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
            listed = f"one of {', '.join(choices)}; " if len(choices) > 2 else f"{listed}, "
            require(value in choices, f"{name} must be {listed}got {value!r}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            require(value >= 0, f"{name} must be 0 or more, got {value}")
        for name in ("label_smoothing", "distill_alpha", "momentum"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")
        require(0.0 < self.adam_beta2 < 1.0, f"adam_beta2 must be in (0, 1), got {self.adam_beta2}")
        require(
            0.0 < self.decay_rate <= 1.0, f"decay_rate must be in (0, 1], got {self.decay_rate}"
        )
        require(
            self.max_text_tokens >= 3,
            f"max_text_tokens must be 3 or more, got {self.max_text_tokens}",
        )
        for name in _ABOVE_ZERO_OR_NONE:
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0 or None, got {value}")
        require(
            self.schedule != "epoch_decay" or self.steps_per_epoch is not None,
            "schedule epoch_decay needs steps_per_epoch: the optimizer steps of one epoch",
        )
        needs = self.patience is not None or self.evaluate_every_steps is not None
        require(
            not needs or self.best_metric is not None,
            "patience and evaluate_every_steps need best_metric: the name of an evaluated number",
        )


_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "dtype": ("float32", "bfloat16"),
    "weight_decay_on": DECAY_SCOPES,
    "teacher_mode": ("eval", "train"),
    "negatives_from": ("rank", "all_ranks"),
    "best_mode": ("min", "max"),
    "sharding": SHARDINGS,
}
_NOT_NEGATIVE = (
    "min_learning_rate",
    "weight_decay",
    "warmup_steps",
    "alpha_ramp_steps",
    "hard_negatives_ramp_steps",
    "queue_size",
    "checkpoint_blocks",
    "max_skipped_in_a_row",
)
_ABOVE_ZERO_OR_NONE = (
    "grad_clip_norm",
    "steps_per_epoch",
    "evaluate_every_steps",
    "patience",
    "peak_flops",
)


def compared_settings(config: TrainConfig, model_config: MEDConfig) -> dict[str, Any]:
    """Return what a run's folder must have been made with, to be continued."""
    train = {name: value for name, value in asdict(config).items() if name not in UNCOMPARED}
    return {"train": train, "model": model_config.to_dict()}


def completed_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as an older version wrote them, with the fields that have come since.

    A new field's default is what the code did before it.
    """
    defaults = {
        field.name: field.default
        for field in fields(TrainConfig)
        if field.default is not MISSING and field.name not in UNCOMPARED
    }
    train = {k: v for k, v in found.get("train", {}).items() if k not in UNCOMPARED}
    model = MEDConfig.from_dict(found.get("model", {})).to_dict()
    return {**found, "train": {**defaults, **train}, "model": model}
