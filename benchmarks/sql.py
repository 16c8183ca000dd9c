"""Questions and decisions over many scored captions, beside DuckDB by hand and pandas as one writes it.

    python benchmarks/sql.py [--quick] [--json PATH] [--policies blip,top_k] [--lake FOLDER] [--no-pandas]

Ten million captions in 100 shards (`sql_lake.py`) are made on the spot. Each measurement is a process of its own, so
that its largest resident memory is its own too:

    funnel, why     as `bootstrap sql` and `bootstrap why` answer
    sweep           19 thresholds of blip, against one hand-written scan for a single one
    decide          each policy, against one COPY of the very rows written by hand: the policy's SELECT over one join
    pandas          the rows of blip with read_parquet, merge and to_parquet

The other side of each comparison runs right before ours. CPU seconds are those of all threads: on a machine that others
use they say more than the clock.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
from sql_lake import make

from storage import Lake, connect, drop_part, part_manifest, query
from storage.candidates import candidates_of
from storage.policy import decide
from storage.policy_file import built_in_policies, read_policy
from storage.policy_run import bound
from storage.sweep import sweep
from storage.why import why

THRESHOLDS = [round(0.05 * i, 2) for i in range(1, 20)]
MEMORY_MB = 2000
TARGETS = {"decide": 1.2, "sweep": 2.0, "why_s": 1.0, "pandas": 5.0}
SCAN = "SELECT source, count(*), count(*) FILTER (WHERE itm_prob >= 0.5) FROM ({}) GROUP BY source"


def ask_funnel(lake: Lake) -> dict[str, Any]:
    """The view, as a user asks for it."""
    return {"rows": query(lake, "FROM funnel WHERE round = 1").num_rows}


def ask_why(lake: Lake) -> dict[str, Any]:
    """An image in the middle of the lake, then one of its texts."""
    with connect(lake) as con:
        image = con.execute(
            "SELECT image_id FROM pairs OFFSET (SELECT count(*) // 2 FROM pairs) LIMIT 1"
        ).fetchall()[0][0]
    found, asked = {}, image
    for name in ("image", "caption"):
        began, spent = time.perf_counter(), time.process_time()
        told = why(lake, asked)
        found |= {
            f"{name}_s": time.perf_counter() - began,
            f"{name}_cpu_s": time.process_time() - spent,
        }
        asked = told["images"][0]["texts"][0]["caption_id"]
    return found


def scan_once(lake: Lake) -> dict[str, Any]:
    """How many texts one threshold keeps, by hand."""
    with connect(lake) as con:
        texts = candidates_of(lake, 1).sql({"source", "itm_prob"})
        return {"rows": con.execute(SCAN.format(texts)).fetchall()}


def sweep_all(lake: Lake) -> dict[str, Any]:
    """19 thresholds."""
    rows = sweep(lake, 1, "blip", "threshold", THRESHOLDS)
    return {"kept": [row.kept for row in rows if row.value == 0.5]}


def decide_by(lake: Lake, policy: str) -> dict[str, Any]:
    """Ours, from nothing; the part is dropped again."""
    ref = decide(lake, 1, policy, activate=False)
    manifest = part_manifest(lake, ref)
    drop_part(lake, ref)
    return {
        "rows": manifest.num_rows,
        "kept": manifest.num_ok,
        "megabytes": manifest.num_bytes / 1e6,
    }


def copy_by_hand(lake: Lake, policy: str, out: Path) -> dict[str, Any]:
    """The same rows as one COPY: all captions joined with all scores, in whatever order they come."""
    chosen = read_policy(policy)
    params = chosen.params({})
    with connect(lake) as con:
        columns = {"caption_id", "image_id", "source", "itm_prob", "itc_sim", "score_error"}
        if "source_name" in chosen.sql:
            columns |= {"source_name"}
        con.execute(f"CREATE TEMP VIEW candidates AS {candidates_of(lake, 1).sql(columns)}")
        sql = (
            "COPY (SELECT caption_id, image_id, source, CAST(1 AS INTEGER) AS round, "
            f"'{policy}' AS policy, '{json.dumps(params)}' AS params, kept, reason, '{policy}-0123456789' AS generation "
            f"FROM (\n{chosen.sql}\n)) TO '{out}' (FORMAT parquet, COMPRESSION zstd)"
        )
        con.execute(sql, bound(con, sql, params))
        kept = con.execute(f"SELECT count(*) FILTER (kept) FROM '{out}'").fetchall()[0][0]
    megabytes = out.stat().st_size / 1e6
    out.unlink()
    return {"kept": kept, "megabytes": megabytes}


def by_pandas(lake: Lake, out: Path) -> dict[str, Any]:
    """blip at 0.5, as one writes it."""
    import pandas as pd

    def read(folder: str, columns: list[str]) -> Any:
        files = sorted(Path(lake.uri, "tables", folder).glob("*.parquet"))
        return pd.concat([pd.read_parquet(f, columns=columns) for f in files], ignore_index=True)

    ids = ["caption_id", "image_id", "source", "status"]
    texts = pd.concat(
        [read("captions/round=0000", ids), read("captions/round=0001", ids)], ignore_index=True
    )
    texts = texts[texts["status"] == "ok"]
    table = texts.merge(
        read("scores/round=0001", ["caption_id", "itm_prob", "error"]), on="caption_id", how="left"
    )
    table["kept"] = table["itm_prob"] >= 0.5
    number = table["itm_prob"].map("itm_prob {:.4f} < 0.5".format)
    table["reason"] = number.where(~table["kept"], "itm_prob >= 0.5")
    table.loc[table["itm_prob"].isna(), "reason"] = "not scored: " + table["error"].fillna("")
    table = table.assign(round=1, policy="blip", params='{"threshold":0.5}')
    table[
        ["caption_id", "image_id", "source", "round", "policy", "params", "kept", "reason"]
    ].to_parquet(out, compression="zstd", index=False)
    out.unlink()
    return {"kept": int(table["kept"].sum())}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "funnel": ask_funnel,
    "why": ask_why,
    "scan": scan_once,
    "sweep": sweep_all,
}


def run_task(name: str, folder: Path) -> dict[str, Any]:
    """One measurement in this process."""
    lake = Lake.open(str(folder))
    kind, _, policy = name.partition(":")
    out = folder.parent / "by-hand.parquet"
    began = time.perf_counter()
    if kind == "decide":
        found = decide_by(lake, policy)
    elif kind == "copy":
        found = copy_by_hand(lake, policy, out)
    elif kind == "pandas":
        found = by_pandas(lake, out)
    else:
        found = TASKS[kind](lake)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return found | {
        "wall_s": time.perf_counter() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,
    }


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", name, "--lake", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {
            "failed": done.stderr.strip().splitlines()[-1] if done.stderr else str(done.returncode)
        }
    found: dict[str, Any] = json.loads(done.stdout)
    print(
        f"{name:<34} {found['wall_s']:8.2f} s  {found['cpu_s']:8.2f} CPU s  {found['peak_mb']:6.0f} MB",
        flush=True,
    )
    return found


def compare(
    title: str, ours: dict[str, Any], theirs: dict[str, Any], target: float
) -> dict[str, Any]:
    """Ours over theirs, by the clock and by CPU time, beside the target."""
    if "failed" in ours or "failed" in theirs:
        return {"title": title, "ours": ours, "theirs": theirs, "met": False}
    wall, cpu = (ours[n] / theirs[n] for n in ("wall_s", "cpu_s"))
    print(
        f"  {title}: {wall:.2f} of its time, {cpu:.2f} of its CPU time; at most {target:g}",
        flush=True,
    )
    return {
        "title": title,
        "ours": ours,
        "theirs": theirs,
        "wall": wall,
        "cpu": cpu,
        "target": target,
        "met": wall <= target,
    }


def main() -> None:
    """Make the lake, measure, print, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="200,000 captions in 8 shards")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--policies", default=",".join(built_in_policies()))
    parser.add_argument("--lake", type=Path, help="an existing lake of sql_lake.py")
    parser.add_argument("--no-pandas", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        sys.stdout.write(json.dumps(run_task(options.task, options.lake), default=str))
        return
    with tempfile.TemporaryDirectory(prefix="bootstrap-sql-") as folder:
        captions, shards = (200_000, 8) if options.quick else (10_000_000, 100)
        if options.lake is None:
            options.lake = Path(folder) / "lake"
            make(options.lake, captions=captions, parts=shards)
        found = measure(options)
    found |= {
        "captions": captions,
        "shards": shards,
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_at_end": os.getloadavg(),
        "duckdb": duckdb.__version__,
        "command": " ".join(sys.argv),
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement on the lake."""
    lake = options.lake
    results: dict[str, Any] = {"funnel": measured("funnel", lake)}
    once = measured("scan", lake)
    results["sweep"] = compare(
        "19 thresholds, one scan", measured("sweep", lake), once, TARGETS["sweep"]
    )
    for policy in options.policies.split(","):
        by_hand = measured(f"copy:{policy}", lake)
        ours = measured(f"decide:{policy}", lake)
        results[f"decide:{policy}"] = compare(
            f"decide {policy}, COPY", ours, by_hand, TARGETS["decide"]
        )
        if "failed" not in ours and "failed" not in by_hand:
            assert ours["kept"] == by_hand["kept"], f"{policy}: other texts were kept"
    decide(Lake.open(str(lake)), 1)
    results["why"] = measured("why", lake)
    told = results["why"]
    said = [
        f"{n} {told[f'{n}_s']:.2f} s, {told[f'{n}_cpu_s']:.2f} CPU s" for n in ("image", "caption")
    ]
    print(f"  why: {'; '.join(said)}; at most {TARGETS['why_s']:g} s", flush=True)
    if not options.no_pandas:
        theirs = measured("pandas", lake)
        results["pandas"] = compare(
            "decide blip, pandas", results["decide:blip"]["ours"], theirs, 1 / TARGETS["pandas"]
        )
    return results


if __name__ == "__main__":
    main()
