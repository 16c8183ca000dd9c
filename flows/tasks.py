"""Every task of the project and its retry policy, on one screen.

A task is a step with Prefect's retries and visibility. Only transient errors are retried, with
backoff and jitter. Prefect's cache decides nothing: a thin task's source hash does not notice that
the core changed, so manifests and fingerprints do (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from flows.steps import (
    arms,
    audit,
    canaries,
    curate_shards,
    decide,
    evaluate,
    ingest,
    judge,
    recheck,
    train,
    variants,
    write_report,
)
from storage import TransientError

P = ParamSpec("P")
R = TypeVar("R")


def is_transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the failure is worth another try as it is."""
    try:
        state.result()
    except TransientError:
        return True
    except BaseException:  # noqa: BLE001 - whatever else it is, a retry will not mend it
        return False
    return False


def pipeline_task(step: Callable[P, R], name: str, *tags: str) -> Callable[P, R]:
    """A step as a task; called like the step itself."""
    made = task(
        name=name,
        tags=tags,
        retries=3,
        retry_delay_seconds=exponential_backoff(5),
        retry_jitter_factor=0.5,
        retry_condition_fn=is_transient,
        cache_policy=NO_CACHE,
    )(step)
    return cast("Callable[P, R]", made)


recheck_task = pipeline_task(recheck.recheck_before_round, "recheck", "network")
ingest_all_task = pipeline_task(ingest.ingest_all, "ingest", "network")
train_model_task = pipeline_task(train.train_model, "train", "device")
curate_shards_task = pipeline_task(curate_shards.curate_shards, "curate-shards", "device")
decide_round_task = pipeline_task(decide.decide_round, "decide")
score_canaries_task = pipeline_task(canaries.score_canaries, "score-canaries", "device")
judge_sample_task = pipeline_task(judge.judge_sample, "judge-sample", "device")
audit_round_task = pipeline_task(audit.audit_round, "audit")
evaluate_model_task = pipeline_task(evaluate.evaluate_model, "evaluate-model", "device")
plan_decodings_task = pipeline_task(arms.plan_decodings, "plan-decodings")
write_variant_task = pipeline_task(variants.write_variant, "write-variant", "device")
plan_arms_task = pipeline_task(arms.plan_arms, "plan-arms")
run_arm_task = pipeline_task(arms.run_arm, "run-arm", "device")
write_report_task = pipeline_task(write_report.write_report, "report")
