"""What Prefect's UI shows of a round: the funnel as a table, the result as text, the report's place.

Outside of a flow run (a step called by hand or by a test) there is nobody to show it to.
"""

from __future__ import annotations

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from flows.comparison.table import Comparison
from flows.comparison.words import markdown
from flows.session import Run
from storage import connect, registry, rounds

COMPARED = (
    "mean_recall",
    "i2t_r1",
    "t2i_r1",
    "itm_auc_random",
    "itm_auc_hard",
    "itm_ap_hard",
    "cider",
    "bleu4",
)


def funnel_table(run: Run) -> None:
    """The round's funnel as a table artifact."""
    if FlowRunContext.get() is None:
        return
    with connect(run.lake, as_of=run.round) as connection:
        rows = connection.execute(
            "SELECT stage, outcome, rows FROM funnel WHERE round = ? ORDER BY step, rows DESC",
            [run.round],
        ).fetchall()
    create_table_artifact(
        table=[dict(zip(("stage", "outcome", "rows"), row, strict=True)) for row in rows],
        key=f"funnel-round-{run.round}",
        description=f"Round {run.round}: from URLs to kept texts",
    )


def round_summary(run: Run, report_path: str) -> None:
    """The round's verdict and figures as a markdown artifact, with a link to the report."""
    if FlowRunContext.get() is None:
        return
    record = rounds.read_round(run.lake, run.round)
    assert record is not None, f"round {run.round} was never begun"
    local = run.lake.root.local_path(report_path)
    place = str(local) if local else f"{run.lake.uri}/{report_path}"
    lines = [
        f"# Round {run.round}: {record.status}",
        record.why or "",
        *_metrics_table(run, record),
        f"Report: `{place}`",
        f"Lake: `{run.lake.uri}`",
    ]
    create_markdown_artifact(
        markdown="\n\n".join(lines), key=f"round-{run.round}", description=record.status
    )
    address = local.as_uri() if local else place
    create_link_artifact(link=address, key=f"report-round-{run.round}", link_text="report")


def comparison_table(run: Run, comparison: Comparison) -> None:
    """A comparison of policies as a markdown artifact."""
    if FlowRunContext.get() is not None:
        create_markdown_artifact(
            markdown=markdown(comparison),
            key=f"compare-round-{run.round}",
            description=f"Round {run.round}: policies compared at {comparison.steps} steps",
        )


def note(text: str, run: Run) -> None:
    """A sentence about the run as a markdown artifact."""
    if FlowRunContext.get() is not None:
        create_markdown_artifact(markdown=text, key=f"note-round-{run.round}")


def _metrics_table(run: Run, record: rounds.RoundRecord) -> list[str]:
    with connect(run.lake) as connection:
        rows = connection.execute(
            "SELECT metric, model_id, value, low, high FROM metrics "
            "WHERE dataset = 'heldout' AND round = ?",
            [run.round],
        ).fetchall()
    values = {(metric, model_id): figures for metric, model_id, *figures in rows}
    before = record.champion_before or _model_id(run, 0)
    after = _model_id(run, run.round)
    lines = [
        "| held-out metric (95 % interval) | champion before | challenger |",
        "|---|---|---|",
    ]
    for metric in COMPARED:
        shown = [_with_interval(*values.get((metric, model), ())) for model in (before, after)]
        lines.append(f"| {metric} | {shown[0]} | {shown[1]} |")
    return ["\n".join(lines)]


def _with_interval(
    value: float | None = None, low: float | None = None, high: float | None = None
) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
    )


def _model_id(run: Run, round: int) -> str | None:
    ref = registry.find(run.lake, "med", round)
    return ref.model_id if ref else None
