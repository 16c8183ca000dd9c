"""The four trainings of a cycle: what each learns, on which rows, from where.

A section's `sql` takes the place of the stage's own rows.
"""

from __future__ import annotations

from flows import models
from flows.errors import MissingInput
from flows.session import Run
from flows.steps.plan import ALL_OBJECTIVES, TrainPlan
from storage import ModelRef, layout, list_parts
from storage.generations import active_generation

HUMAN_SQL = "SELECT DISTINCT image_id, caption, source FROM human"
FIRST_ROUND_SQL = f"""
    SELECT DISTINCT image_id, caption, source FROM raw WHERE shard < '{layout.web_shards(2)}'
    AND caption_id NOT IN (SELECT caption_id FROM brought_later)
    UNION ALL {HUMAN_SQL}
"""


def clean_sql(round: int, generation: str | None = None, variant: str | None = None) -> str:
    """Kept web and synthetic texts of a round, and the human ones (paper, section 3.3).

    Without a generation, those of the decisions that count. With a variant, its captions are the synthetic ones.
    """
    verdicts = "verdicts" if generation is None else f"verdicts_of({round}, '{generation}')"
    if variant is not None:
        of_variant = f"variant = '{variant}' AND generation = '{generation}'"
        verdicts = f"(FROM variant_verdicts WHERE {of_variant})"
    return f"SELECT image_id, caption, source FROM {verdicts} WHERE kept AND round = {round} UNION ALL {HUMAN_SQL}"


def pretrain(run: Run) -> TrainPlan:
    """The first model: all raw web pairs and the human pairs; it belongs to round 0."""
    return TrainPlan(
        name="pretrain",
        role="med",
        round=0,
        sql=run.settings.pretrain.sql or FIRST_ROUND_SQL,
        objectives=ALL_OBJECTIVES,
        parent=None,
        tokenizer_of=None,
        settings=run.settings.pretrain,
    )


def captioner(run: Run) -> TrainPlan:
    """LM on the human pairs, from the starting model (paper, section 3.3)."""
    start = models.starting_model(run)
    return TrainPlan(
        name="captioner",
        role="captioner",
        round=run.round,
        sql=run.settings.captioner.sql or HUMAN_SQL,
        objectives=("lm",),
        parent=start,
        tokenizer_of=start,
        settings=run.settings.captioner,
    )


def filter_(run: Run) -> TrainPlan:
    """ITC and ITM on the human pairs, from the same starting model (paper, section 3.3)."""
    start = models.starting_model(run)
    return TrainPlan(
        name="filter",
        role="filter",
        round=run.round,
        sql=run.settings.filter.sql or HUMAN_SQL,
        objectives=("itc", "itm"),
        parent=start,
        tokenizer_of=start,
        settings=run.settings.filter,
    )


def retrain(run: Run) -> TrainPlan:
    """A new model on the clean set; it takes over the starting model's vocabulary only.

    The round's own decisions make its clean set, whatever was let count by hand since.

    Raises:
        MissingInput: the round has not decided yet.
    """
    if not list_parts(run.lake, "decisions", run.round):
        raise MissingInput(f"round {run.round} has no decisions; run `bootstrap decide` first")
    active = active_generation(run.lake, run.round)
    own = active.of_round if active and active.of_round != active.generation else None
    return TrainPlan(
        name="retrain",
        role="med",
        round=run.round,
        sql=run.settings.retrain_or_pretrain.sql or clean_sql(run.round, own),
        objectives=ALL_OBJECTIVES,
        parent=None,
        tokenizer_of=models.starting_model(run),
        settings=run.settings.retrain_or_pretrain,
    )


def challenger(run: Run) -> ModelRef:
    """The round's new model."""
    return models.require(run, "med", run.round)
