"""Every task of the project and its retry policy, on one screen.

A task is a step with Prefect's retries and visibility. Only transient errors are retried, with
backoff and jitter. Prefect's cache decides nothing: a thin task's source hash does not notice that
the core changed, so manifests and fingerprints do (docs/decisions.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from flows.steps import caption, decide, evaluate, ingest, score, train, write_report
from storage import TransientError


def is_transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the failure is worth another try as it is."""
    try:
        state.result()
    except TransientError:
        return True
    except BaseException:  # noqa: BLE001 - whatever else it is, a retry will not mend it
        return False
    return False


pipeline_task = partial(
    task,
    retries=3,
    retry_delay_seconds=exponential_backoff(5),
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
)

ingest_all_task = pipeline_task(ingest.ingest_all, name="ingest", tags=["network"])
train_model_task = pipeline_task(train.train_model, name="train", tags=["device"])
caption_shard_task = pipeline_task(caption.caption_shard, name="caption-shard", tags=["device"])
score_shard_task = pipeline_task(score.score_shard, name="score-shard", tags=["device"])
decide_round_task = pipeline_task(decide.decide_round, name="decide")
evaluate_model_task = pipeline_task(evaluate.evaluate_model, name="evaluate-model", tags=["device"])
write_report_task = pipeline_task(write_report.write_report, name="report")
