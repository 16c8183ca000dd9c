"""Does the gate refuse a bad round for the right reason? Four rounds in the drawn world, two of them sabotaged.

Round 1 is as usual. In round 2 the captioner says the same of every picture, in round 3 it names every colour wrongly.
Round 4 is as usual again, and goes on from the champion of round 1. About 15 minutes on two CPU cores.

    python benchmarks/demo_rounds.py --out docs/results      writes rounds.md, rounds.svg and rounds_captions.svg
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rounds_svg import caption_sheet, figures_svg
from sabotaged_captioners import WORLD_VARIABLE

from storage import Lake, query

HERE = Path(__file__).resolve().parent
SETTINGS: dict[str, Any] = {
    "preset": "quickstart",
    "world": {"num_web": 3000, "num_human": 300, "num_heldout": 300},
    "ingest": {"timeout_s": 2.0},
    "pretrain": {"steps": 300, "alpha_ramp_steps": 150, "warmup_steps": 30},
    "captioner": {"steps": 100, "warmup_steps": 10},
    "filter": {"steps": 120},
}
"""The quickstart with half the pictures and steps."""
ROUNDS = (
    ("as usual", None, "promoted"),
    ("the same caption for every picture", "same_caption", "refused"),
    ("right shapes, wrong colours", "wrong_colours", "refused"),
    ("as usual", None, "promoted"),
)

DECISIVE_SQL = """
SELECT round, string_agg('`' || rule || '`: ' || why, '<br>' ORDER BY rule) AS why
FROM gate_rules WHERE outcome = 'fail' AND verdict_if_failed = 'refuse' GROUP BY round
"""


def main() -> None:
    """Run the rounds that are not there yet, check the verdicts, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("lakes/demo-rounds"))
    parser.add_argument("--out", type=Path, help="folder for the page and its pictures")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    took = [_run(work, number, sabotage) for number, (_, sabotage, _) in enumerate(ROUNDS, 1)]
    lake = Lake.open(str(work / "lake"), read_only=True)
    said = "\n\n".join(_command(work, *arguments) for arguments in (["rounds"], ["compare-rounds"]))
    sys.stdout.write(f"{said}\n")
    if options.out:
        _write(options.out, lake, work, took)
    _check(lake)


def _run(work: Path, number: int, sabotage: str | None) -> float:
    """One round with the command that anybody would use; returns its seconds."""
    settings = SETTINGS | {
        "machine": {"lake": str(work / "lake")},
        "world": SETTINGS["world"] | {"folder": str(work / "world")},
    }
    if sabotage:
        settings["caption"] = {"captioner": f"python:{HERE / 'sabotaged_captioners.py'}:{sabotage}"}
    path = work / f"round-{number}.yaml"
    preset = settings.pop("preset")
    base = _preset(preset)
    path.write_text(json.dumps(_merged(base, settings)), encoding="utf-8")
    began = time.monotonic()
    done = work / f"round-{number}.json"
    if not done.is_file():
        _command(work, "run" if number == 1 else "next-round", "--config", str(path))
        done.write_text(json.dumps(time.monotonic() - began), encoding="utf-8")
    return float(json.loads(done.read_text(encoding="utf-8")))


def _preset(name: str) -> dict[str, Any]:
    from flows.settings import load_preset

    return load_preset(name)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    from flows.settings import merge

    return merge(base, over)


def _command(work: Path, *arguments: str) -> str:
    """`bootstrap ...` as a process; what it printed."""
    where = [] if "--config" in arguments else ["--lake", str(work / "lake")]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, *where],
        cwd=work,
        env=os.environ
        | {
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
            WORLD_VARIABLE: str(work / "world"),
            "COLUMNS": "100",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"bootstrap {' '.join(arguments)} failed:\n{done.stdout[-3000:]}")
    return done.stdout.rstrip()


def _check(lake: Lake) -> None:
    """The verdicts are those that were meant, the refusals for their reason, the champion stayed."""
    rows = query(lake, "FROM compare_rounds ORDER BY round").to_pylist()
    found = [row["status"] for row in rows]
    wanted = [status for _, _, status in ROUNDS]
    if found[:3] != wanted[:3] or found[3] == "refused":
        sys.exit(f"verdicts: {found}, expected {wanted}")
    reasons = [set((row["failed_rules"] or "").split(", ")) for row in rows]
    if "distinct_share_first" not in reasons[1]:
        sys.exit(f"round 2 was refused for {sorted(reasons[1])}, not for its variety")
    if "matched_share_last" not in reasons[2] or "distinct_share_first" in reasons[2]:
        sys.exit(f"round 3 was refused for {sorted(reasons[2])}, not for what the filter says")
    if rows[3]["champion_before"] != rows[0]["champion_after"]:
        sys.exit("round 4 did not begin with the champion of round 1")
    sys.stdout.write(f"refused for the right reasons: {found}\n")


def _write(out: Path, lake: Lake, work: Path, took: list[float]) -> None:
    """The page with the commands' own output, and its two pictures."""
    rows = query(lake, "FROM compare_rounds ORDER BY round").to_pylist()
    decisive = {row["round"]: row["why"] for row in query(lake, DECISIVE_SQL).to_pylist()}
    (out / "rounds.svg").write_text(figures_svg(rows), encoding="utf-8")
    (out / "rounds_captions.svg").write_text(caption_sheet(lake, len(rows)), encoding="utf-8")
    lines = [
        "# A gate that refuses",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores ({platform.machine()}), no GPU, load average at the "
        f"end {os.getloadavg()[2]:.0f}. "
        f"`make demo-rounds`: {sum(took) / 60:.0f} minutes for four rounds "
        f"({', '.join(f'{seconds:.0f} s' for seconds in took)}). One seed, one run; the world is the "
        "quickstart's with half the pictures and 300 steps.",
        "Rounds 2 and 3 are sabotaged through `caption.captioner: python:FILE.py:FUNCTION`, the door for "
        "anybody's own captioner (`benchmarks/sabotaged_captioners.py`). Everything else is as in round 1.",
        "| round | captioner | verdict | why |\n|---|---|---|---|\n"
        + "\n".join(
            f"| {row['round']} | {what} | **{row['status']}** | {decisive.get(row['round'], row['why'])} |"
            for row, (what, _, _) in zip(rows, ROUNDS, strict=True)
        ),
        *_by_recall_alone(rows),
        "![figures by round](rounds.svg)",
        "The same pictures in every round, with what the round's captioner wrote and what its filter said:",
        "![captions by round](rounds_captions.svg)",
        "## What the commands print",
        *(
            f"```\n$ bootstrap {' '.join(arguments)}\n{_command(work, *arguments)}\n```"
            for arguments in (["rounds"], ["compare-rounds"], ["rounds", "2"], ["rounds", "3"])
        ),
    ]
    (out / "rounds.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _by_recall_alone(rows: list[dict[str, Any]]) -> list[str]:
    """What a gate that looks at recall and nothing else would have done with the refused rounds."""
    passed = [
        f"{row['round']} ({row['recall_gain']:+.3f}, {row['recall_gain_low']:+.3f} to {row['recall_gain_high']:+.3f})"
        for row in rows
        if row["status"] == "refused" and (row["recall_gain"] or 0) > 0
    ]
    if not passed:
        return []
    return [
        f"A gate of recall alone would have promoted round {' and round '.join(passed)}: the filter drops what the "
        "sabotaged captioner writes, so that the new model learns from web texts alone, which a better filter than in "
        f"round 1 has chosen. In this small world that is no bad model (round 4 reaches {rows[-1]['best_mean_recall']:.3f}). "
        "What the gate refuses is a round whose captioner is broken, before it is built upon; who wants the model all the "
        'same says so: `bootstrap promote 2 --because "..."`.'
    ]


if __name__ == "__main__":
    main()
