"""The cycle: noisy pairs in, a clean set, a better model and the evidence for both out.

One turn is a round. `full-cycle` runs or resumes round 1; `next-round` starts from the champion.
Whatever is committed already is found, not made again, so the same call resumes a killed run.
"""

from __future__ import annotations

from prefect import flow

from flows import artifacts, stages
from flows.outcome import RoundOutcome, note_origin, nothing_new, outcome
from flows.session import open_run
from flows.settings import BootstrapSettings
from flows.steps.ingest import require_sets


@flow(name="bootstrap", log_prints=False)
def bootstrap(settings: BootstrapSettings) -> RoundOutcome:
    """Run one round, from URL list to report.

    Args:
        settings: preset and whatever is changed over it.
    """
    if settings.cycle == "next-round":
        stages.recheck(settings)
    with open_run(settings, purpose="bootstrap") as run:
        require_sets(run)
        stages.ingest(settings)
        if (idle := nothing_new(run)) is not None:
            artifacts.note(idle.why, run)
            return idle
        if (origin := note_origin(run)) is not None:
            artifacts.note(origin, run)
        if run.round == 1:
            stages.pretrain(settings)
        if settings.caption.captioner == "own":
            stages.finetune_captioner(settings)
        if settings.score.scorer == "own":
            stages.finetune_filter(settings)
        stages.captions_and_scores(settings)
        stages.decide(settings)
        stages.audit(settings)
        stages.train(settings)
        stages.evaluate(settings)
        stages.gate(settings)
        stages.report(settings)
        return outcome(run)
