"""The section of one training: pretrain, captioner, filter and retrain have the same fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from flows.sections import Section
from storage.schemas import SOURCES


class TrainSettings(Section):
    """One training run; the fields are those of `blip_core.TrainConfig`, and what its rows are."""

    sql: str | None = None
    """Query over the lake's views that gives the rows: image_id, caption, source; the stage's own when null."""

    steps: int = Field(default=100_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Pairs in a forward pass, shared equally by machine.train_processes."""
    accumulate_steps: int = Field(default=1, ge=1)
    """Forward passes that make one optimizer step."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    fresh_lr_scale: float = Field(default=1.0, gt=0)
    """Factor of it for cross-attention and heads, when the rest starts from trained weights."""
    min_learning_rate: float = Field(default=1e-6, ge=0)
    """Learning rate at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant", "step_decay", "epoch_decay"] = "cosine"
    """How the learning rate falls; step_decay multiplies it by decay_rate every twentieth of the
    run, epoch_decay after every epoch."""
    decay_rate: float = Field(default=0.9, gt=0, le=1)
    """Factor of step_decay and epoch_decay."""
    steps_per_epoch: int | None = Field(default=None, ge=1)
    """Steps of an epoch for epoch_decay; those that read every row once when not given."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW weight decay."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """What decays: matrices, or all parameters as in the released code."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's second momentum; 0.98 suits short runs."""
    grad_clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; no clipping when null."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the language-model loss."""
    distill_alpha: float = Field(default=0.4, ge=0, le=1)
    """Weight of the momentum teacher's soft targets."""
    alpha_ramp_steps: int = Field(default=0, ge=0)
    """Steps over which that weight rises from 0."""
    momentum: float = Field(default=0.995, ge=0, lt=1)
    """Momentum of the teacher."""
    teacher_mode: Literal["eval", "train"] = "eval"
    """Teacher without dropout, or with it as in the released code."""
    queue_size: int = Field(default=57_600, ge=0)
    """Features kept in the contrastive queue."""
    negatives_from: Literal["rank", "all_ranks"] = "rank"
    """Hard negatives from a process's own batch, or from all processes'."""
    hard_negatives_ramp_steps: int = Field(default=0, ge=0)
    """Steps over which ITM's negatives go from even draws to hard ones; hard at once when 0."""
    prompt: str = ""
    """Text put before every caption in the language-model loss, itself not supervised."""
    max_text_tokens: int = Field(default=30, ge=4)
    """Longest text in tokens, special tokens included."""
    captions_per_epoch: Literal["all", "one"] = "all"
    """An epoch holds every pair once, or every image once with one of its captions, drawn anew."""
    source_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Weight of each source when one caption is drawn, such as {web: 1, synthetic: 1, human: 2};
    an image's captions of one source share it. All alike when not given."""
    augment: Literal["none", "flip_crop", "paper"] = "paper"
    """Image augmentation: none, crop and flip, or crop, flip and RandAugment as in the paper."""
    min_crop_area: float = Field(default=0.2, gt=0, le=1)
    """Smallest part of a picture that a crop shows (paper: 0.2 in pretraining, 0.5 in finetuning)."""
    swap_sides: bool = True
    """Exchange left and right in the text of a mirrored picture; the released code does not."""
    freeze: tuple[Literal["vision", "text", "text.word_embeddings"], ...] = ()
    """Parts whose weights stay as they are."""
    cache_vision: bool = False
    """Encode every image once, before the first step: for frozen vision without augmentation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the forward pass."""
    compile: bool = False
    """Compile the vision blocks with torch.compile."""
    checkpoint_blocks: int = Field(default=0, ge=0)
    """Last vision blocks that are computed again in backward, to save memory."""
    dev_share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the human images held back to evaluate on; the best model there is kept."""
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between two evaluations on the pairs held back."""
    best_metric: Literal["dev_loss", "dev_loss_itc", "dev_loss_itm", "dev_loss_lm"] = "dev_loss"
    """Of these the least decides: the sum of what is trained, or one of its parts."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a better one after which training stops; never when null."""
    checkpoint_every_steps: int = Field(default=1000, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Last checkpoints that are kept while training."""
    log_every_steps: int = Field(default=50, ge=1)
    """Steps between two logged points."""
    max_skipped_in_a_row: int = Field(default=10, ge=0)
    """Steps in a row that may be left out because their loss is not finite."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Operations a second that the device could do, for the logged mfu; known for some GPUs."""

    @field_validator("sql")
    @classmethod
    def _one_query(cls, given: str | None) -> str | None:
        sql = given.strip().rstrip(";").rstrip() if given is not None else None
        if sql == "":
            raise ValueError("sql is empty; leave it out, or give a query")
        return sql

    @model_validator(mode="after")
    def _check_together(self) -> TrainSettings:
        if 0 < self.queue_size < self.batch_size * self.accumulate_steps:
            raise ValueError(
                f"queue_size {self.queue_size} is smaller than batch_size {self.batch_size} "
                f"x accumulate_steps {self.accumulate_steps}; use 0 for no queue, or at least one step"
            )
        if self.cache_vision and ("vision" not in self.freeze or self.augment != "none"):
            raise ValueError(
                "cache_vision keeps what vision made of each image: it needs freeze: [vision] and "
                f"augment: none, got freeze {list(self.freeze)} and augment {self.augment}"
            )
        if self.dev_share and self.evaluate_every_steps is None:
            raise ValueError(
                f"dev_share {self.dev_share} holds pairs back to evaluate on: give "
                "evaluate_every_steps too"
            )
        if not self.dev_share and (self.evaluate_every_steps or self.patience):
            raise ValueError(
                "evaluate_every_steps and patience need pairs that are not trained on: give "
                "dev_share, such as 0.05"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _check_source_weights(self) -> TrainSettings:
        weights = self.source_weights
        if weights is None:
            return self
        if self.captions_per_epoch != "one":
            raise ValueError(
                "source_weights say which caption is drawn: set captions_per_epoch: one"
            )
        if set(weights) != set(SOURCES):
            raise ValueError(
                f"source_weights must name {', '.join(SOURCES)}, 0 to draw none of one; "
                f"they name {', '.join(weights) or 'none'}"
            )
        if not any(weights.values()):
            raise ValueError("source_weights are all 0: no caption could be drawn")
        return self
