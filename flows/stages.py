"""The stages of a round, each a flow that the cycle calls and that also runs alone.

A stage finds its inputs in the lake: the committed parts and models of its round. What is
committed with the same fingerprint is not made again.
"""

from __future__ import annotations

import logging

from prefect import flow

from flows import artifacts, models, tasks
from flows.book import finish_round, reopen_round, timed
from flows.comparison.table import Comparison, compared
from flows.errors import MissingInput
from flows.progress import StageProgress
from flows.quickstart.truth import measure_truth
from flows.refs import StageResult
from flows.session import Run, open_beside, open_run
from flows.settings import BootstrapSettings
from flows.steps import plans
from flows.steps.collapse import measure_captions
from flows.steps.gate import Verdict, judge, write_findings
from flows.steps.ingest import drawn_world
from flows.steps.plan import TrainPlan
from storage import ModelRef, PartRef, registry, rounds, write_catalog

logger = logging.getLogger(__name__)


@flow(name="recheck")
def recheck(settings: BootstrapSettings) -> None:
    """Before a later round: a share of the kept web images is asked for again, and who opted out since is purged."""
    tasks.recheck_task(settings)


@flow(name="ingest", validate_parameters=True)
def ingest(settings: BootstrapSettings) -> StageResult:
    """URL lists and human pairs to shards, `pairs` and `captions` of round 0."""
    with open_run(settings, purpose="ingest") as run, timed(run, "ingest") as book:
        with StageProgress("ingest", "URLs fetched", run.round) as progress:
            parts = tasks.ingest_all_task(run, progress)
        book.count("pairs", sum(part.num_rows for part in parts if part.table == "pairs"))
        return _result(run, "ingest", parts)


@flow(name="pretrain")
def pretrain(settings: BootstrapSettings) -> ModelRef:
    """The first model, on the raw web pairs and the human pairs (paper, section 3.2); round 0."""
    with open_run(settings, purpose="pretrain") as run:
        ref = _train(run, plans.pretrain(run))
        last = registry.last_promotion(run.lake)
        if last is None or (last["round"] == 0 and last["model_id"] != ref.model_id):
            registry.promote(run.lake, ref.model_id, 0, "the first model")
        return ref


@flow(name="finetune-captioner")
def finetune_captioner(settings: BootstrapSettings) -> ModelRef:
    """The captioner: the starting model finetuned on human pairs with LM (paper, section 3.3)."""
    with open_run(settings, purpose="finetune-captioner") as run:
        return _train(run, plans.captioner(run))


@flow(name="finetune-filter")
def finetune_filter(settings: BootstrapSettings) -> ModelRef:
    """The filter: the starting model finetuned on human pairs with ITC + ITM, apart from the
    captioner (paper, section 3.3 and Table 4).
    """
    with open_run(settings, purpose="finetune-filter") as run:
        return _train(run, plans.filter_(run))


@flow(name="caption")
def caption(settings: BootstrapSettings) -> StageResult:
    """New captions for every web image, one part a shard."""
    with open_run(settings, purpose="caption") as run:
        return _shards(run, "caption", models.captioner_ref(run), None)


@flow(name="score")
def score(settings: BootstrapSettings) -> StageResult:
    """itm_prob and itc_sim of every web and synthetic text, one part a shard."""
    with open_run(settings, purpose="score") as run:
        return _shards(run, "score", None, models.scorer_ref(run))


@flow(name="caption-and-score")
def caption_and_score(settings: BootstrapSettings) -> StageResult:
    """`caption` and `score` in one pass over the images: each is decoded once for both models."""
    with open_run(settings, purpose="caption-and-score") as run:
        captioner, scorer = models.captioner_ref(run), models.scorer_ref(run)
        return _shards(run, "caption-and-score", captioner, scorer)


def captions_and_scores(settings: BootstrapSettings) -> None:
    """Both, in one pass or in two, as `curate.fused` says; the rows are the same."""
    if settings.curate.fused:
        caption_and_score(settings)
    else:
        caption(settings)
        score(settings)


@flow(name="decide")
def decide(settings: BootstrapSettings) -> StageResult:
    """One SQL policy over captions and scores: every text kept or dropped, with its reason."""
    with open_run(settings, purpose="decide") as run, timed(run, "decide") as book:
        part = tasks.decide_round_task(run)
        book.count("decisions", part.num_rows)
        write_catalog(run.lake)
        artifacts.funnel_table(run)
        return _result(run, "decide", [part])


@flow(name="curate")
def curate(settings: BootstrapSettings) -> StageResult:
    """Caption, score and decide."""
    with open_run(settings, purpose="curate"):
        captions_and_scores(settings)
        return decide(settings)


@flow(name="audit")
def audit(settings: BootstrapSettings) -> StageResult:
    """The filter by pairs whose truth is known, and the round's texts by a judge outside the loop.

    A lake with too few canaries goes without them, and says so.
    """
    with open_run(settings, purpose="audit") as run, timed(run, "audit"):
        parts = []
        try:
            if run.settings.audit.canary_share:
                parts.append(tasks.score_canaries_task(run))
        except MissingInput as err:
            logger.warning("round %d is not audited by canaries: %s", run.round, err)
        judged = tasks.judge_sample_task(run)
        parts += [judged] if judged is not None else []
        parts.append(tasks.audit_round_task(run))
        return _result(run, "audit", parts)


@flow(name="train")
def train(settings: BootstrapSettings) -> ModelRef:
    """A NEW model on the round's clean set and the human pairs (paper, Table 13)."""
    with open_run(settings, purpose="train") as run:
        return _train(run, plans.retrain(run), reopens=True)


@flow(name="evaluate")
def evaluate(settings: BootstrapSettings) -> StageResult:
    """The round's new model and the champion it must beat, on the held-out human pairs."""
    with open_run(settings, purpose="evaluate") as run, timed(run, "evaluate"):
        whole = [models.starting_model(run), plans.challenger(run)]
        wanted = list(whole)
        if run.settings.evaluate.finetuned:
            wanted += models.finetuned(run)
        parts = []
        with StageProgress("evaluate", "Models measured", run.round) as progress:
            for done, ref in enumerate(wanted):
                parts.append(tasks.evaluate_model_task(run, ref))
                if run.settings.world is not None and ref in whole:
                    parts.append(measure_truth(run, ref, drawn_world(run.settings)))
                progress(done + 1, len(wanted), ref.model_id[:8])
        parts += measure_captions(run)
        return _result(run, "evaluate", parts)


@flow(name="gate")
def gate(settings: BootstrapSettings) -> Verdict:
    """Promote the round's model to champion, refuse it, or ask a person; always with the reason.

    A round that has its verdict keeps it.
    """
    with open_run(settings, purpose="gate") as run:
        champion, challenger = models.starting_model(run), plans.challenger(run)
        verdict = judge(run, champion, challenger)
        record = rounds.read_round(run.lake, run.round)
        if record is None or record.status == "running":
            write_findings(run, verdict)
            latest = rounds.latest_round(run.lake)
            if verdict.promoted and latest is not None and latest.round == run.round:
                registry.promote(run.lake, challenger.model_id, run.round, verdict.why)
            finish_round(run, verdict, (challenger if verdict.promoted else champion).model_id)
        logger.info("round %d: %s: %s", run.round, verdict.status, verdict.why)
        return verdict


@flow(name="compare")
def compare(settings: BootstrapSettings) -> Comparison:
    """New models of several policies on one round's texts, measured alike: did filtering and captioning pay?

    With decodings, on captions of each (paper, Table 2). No round takes part in it: it changes no verdict, no champion
    and no view of a round.
    """
    wanted = settings.compare.round
    with open_beside(settings, purpose="compare", round=wanted) as run:
        for decoding in tasks.plan_decodings_task(run):
            with StageProgress(f"{decoding} captions", "Web rows", run.round) as progress:
                tasks.write_variant_task(run, decoding, progress)
        arms = tasks.plan_arms_task(run)
        for number, arm in enumerate(arms):
            about = f"Arm {number + 1} of {len(arms)}: steps"
            with StageProgress(arm.title, about, run.round) as progress:
                tasks.run_arm_task(run, arm, progress)
        comparison = compared(
            run.lake,
            run.round,
            steps=arms[0].steps,
            generations=list(dict.fromkeys(arm.texts.generation for arm in arms)),
            seeds={arm.seed for arm in arms},
        )
        assert comparison is not None, f"{len(arms)} arms left no figure"
        write_catalog(run.lake)
        artifacts.comparison_table(run, comparison)
        return comparison


@flow(name="report")
def report(settings: BootstrapSettings) -> str:
    """The round's static page; returns its path in the lake."""
    with open_run(settings, purpose="report") as run:
        path: str = tasks.write_report_task(run)
        write_catalog(run.lake)
        artifacts.round_summary(run, path)
        return path


def _train(run: Run, plan: TrainPlan, *, reopens: bool = False) -> ModelRef:
    """One training as a task, with its progress and its time in the round's record.

    With `reopens`, a model that was built anew takes back the verdict on the one before it.
    """
    with timed(run, plan.name), StageProgress(plan.name, "Optimizer steps", run.round) as progress:
        ref, built = tasks.train_model_task(run, plan, progress)
    if built and reopens:
        reopen_round(run)
    logger.info(
        "round %d %s: model %s %s",
        run.round,
        plan.name,
        ref.model_id,
        "trained" if built else "found, nothing to do",
    )
    return ref


def _shards(
    run: Run, stage: str, captioner: ModelRef | None, scorer: ModelRef | None
) -> StageResult:
    """One task over every web part of `pairs`: shards overlap, so that the device waits for none."""
    with timed(run, stage) as book, StageProgress(stage, "Web rows", run.round) as progress:
        curated = tasks.curate_shards_task(run, captioner, scorer, progress)
        book.speed.update(curated.speed)
        for table in ("captions", "scores"):
            parts = [part for part in curated.parts if part.table == table]
            if parts:
                book.count(f"{table.removesuffix('s')}_rows", sum(part.num_rows for part in parts))
    return _result(run, stage, curated.parts, len(curated.parts) - curated.built)


def _result(run: Run, stage: str, parts: list[PartRef], reused: int = 0) -> StageResult:
    rows = sum(part.num_rows for part in parts)
    paths = tuple(part.path for part in parts)
    return StageResult(stage=stage, round=run.round, parts=paths, num_rows=rows, reused=reused)
