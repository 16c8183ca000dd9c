"""What the quickstart prints at its end: the funnel, the filter against the truth, raw against clean."""

from __future__ import annotations

from pathlib import Path

from flows.audit.show import audit_figures, audit_table
from flows.outcome import RoundOutcome
from flows.quickstart.verdict import compare_arms, judge_round, noise_truth, render_verdict
from flows.quickstart.world import load_world
from flows.settings import BootstrapSettings
from flows.terminal import console, table
from storage import Lake, connect, layout, registry
from storage.generations import active_generation

QUERIES = {
    "what was dropped, and why": "SELECT source_name, source, caption, reason FROM rejected LIMIT 10",
    "which source is noisiest": "SELECT * FROM noise",
    "borderline texts": (
        "SELECT caption, source, itm_prob FROM clean WHERE itm_prob < 0.6 ORDER BY itm_prob LIMIT 10"
    ),
}


def show(settings: BootstrapSettings, result: RoundOutcome) -> None:
    """Print everything that the round's lake says, and where to look next."""
    lake = Lake.open(result.lake, read_only=True)
    with connect(lake) as connection:
        funnel = connection.execute(
            'SELECT stage, outcome, "rows" FROM funnel WHERE round = ? ORDER BY step, "rows" DESC',
            [result.round],
        ).fetchall()
        console.print(table(("stage", "outcome", "rows"), funnel, title="The funnel"))
        if settings.world is not None:
            world = load_world(Path(settings.world.folder))
            raw = registry.find(lake, "med", 0)
            clean = registry.find(lake, "med", result.round)
            arms = compare_arms(connection, raw.model_id, clean.model_id) if raw and clean else ()
            active = active_generation(lake, result.round)
            decided = active.of_round if active else settings.decide.policy
            verdict = judge_round(connection, world, result.round, decided)
            console.print()
            console.print(render_verdict(verdict, arms))
            figures = audit_figures(connection, result.round)
            if figures:
                console.print(audit_table(figures, noise_truth(verdict)))
                console.print()
    console.print(f"Round {result.round}: {result.status}. {result.why}", highlight=False)
    report = lake.root.local_path(layout.report(result.round))
    console.print(f"\nreport: {report or layout.report(result.round)}", highlight=False)
    console.print(f"lake:   {result.lake}\n", highlight=False)
    console.print("Three questions to try:", highlight=False)
    for question, query in QUERIES.items():
        console.print(f"  [dim]# {question}[/]", highlight=False)
        console.print(f'  .venv/bin/bootstrap sql "{query}"', highlight=False, soft_wrap=True)
