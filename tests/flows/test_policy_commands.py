"""`decide` by hand, `sweep`, `why`, `sql` and `policies`, as a user types them."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from cycle import bootstrap, command_environment
from lake_tables import LakeTables

from flows.errors import SettingsError
from flows.quickstart.world import WorldConfig, build_world
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.decide import decide_round
from flows.sweep_command import noise_estimate, values_of
from storage import Lake, basis_of, commit_part, connect, drop_part, list_parts, query, rounds
from storage.generations import active_generation
from storage.policy import decide
from storage.tables import rows_table


@pytest.fixture
def made(tmp_path: Path) -> Lake:
    """A lake with one finished round of made-up numbers, decided by blip at 0.5."""
    config = WorldConfig(num_web=60, num_human=1, num_heldout=1)
    tables = LakeTables(build_world(config, tmp_path / "world"))
    lake = tables.commit(str(tmp_path / "lake"))
    texts = tables.table("captions")
    for table in ("captions", "decisions"):
        for part in list_parts(lake, table, 1):
            drop_part(lake, part)
    for round in (0, 1):
        rows = texts.filter(pc.equal(texts.column("round"), round))
        commit_part(lake, "captions", "test", rows, round=round, basis=basis_of("test", 1, {}, []))
    decide(lake, 1)
    return lake


def _run(lake: Lake, *arguments: str) -> str:
    done = bootstrap(*arguments, "--lake", lake.uri, cwd=Path(lake.uri).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_decide_by_hand_writes_a_generation_beside_the_rounds_own(made: Lake) -> None:
    own = active_generation(made, 1)
    assert own is not None
    record = made.root.read_bytes("rounds/0001/policy.json")
    said = _run(made, "decide", "--policy", "blip", "--set", "threshold=0.6")
    (other,) = {part.name for part in list_parts(made, "decisions", 1)} - {own.generation}
    assert f"generation {other}" in said
    assert f"still show {own.generation}; --activate changes that" in said
    assert made.root.read_bytes("rounds/0001/policy.json") == record
    expected = "SELECT caption_id FROM scores WHERE itm_prob >= 0.6 ORDER BY 1"
    kept = f"SELECT caption_id FROM decisions WHERE kept AND generation = '{other}' ORDER BY 1"
    assert query(made, kept).equals(query(made, expected)), "what a full run at 0.6 keeps"
    assert query(made, kept).num_rows

    said = _run(made, "decide", "--set", "threshold=0.6", "--activate")
    assert f"show {other} now" in said
    now = active_generation(made, 1)
    assert now is not None
    assert (now.generation, now.of_round) == (other, own.generation)
    assert query(made, "SELECT DISTINCT generation FROM clean").to_pylist() == [
        {"generation": other}
    ]


def test_decide_lets_a_generation_that_lies_there_count(made: Lake) -> None:
    own = active_generation(made, 1)
    assert own is not None
    other = decide(made, 1, "raw", activate=False)
    parts = list_parts(made, "decisions", 1)
    for arguments, counts in (((other.name[:6],), other.name), ((), own.generation)):
        assert f"show {counts} now" in _run(made, "decide", "--activate", *arguments)
        now = active_generation(made, 1)
        assert now is not None
        assert (now.generation, now.of_round) == (counts, own.of_round)
    assert list_parts(made, "decisions", 1) == parts
    folder = Path(made.uri).parent
    for arguments, said in (
        (("top_k",), "no decisions named 'top_k'; there are blip-"),
        (("raw", "--policy", "raw"), "a generation is named where nothing is decided"),
    ):
        done = bootstrap("decide", "--activate", *arguments, "--lake", made.uri, cwd=folder)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_decide_by_hand_says_what_is_wrong_with_a_policy_or_parameter(made: Lake) -> None:
    folder = Path(made.uri).parent
    (folder / "mine.sql").write_text(
        "SELECT caption_id, random() > 0.5 AS kept, 'x' AS reason\nFROM candidates"
    )
    for arguments, said in (
        (("--policy", "nobodys"), "'nobodys' is unknown; there are all, best_of, blip"),
        (("--policy", "blip", "--set", "treshold=0.6"), "no parameter 'treshold'"),
        (("--policy", "blip", "--set", "threshold=6"), "6 is not a number from 0 to 1"),
        (("--policy", "mine.sql"), "policy mine, line 1, `SELECT caption_id, random()"),
        (("--policy", "raw", "--round", "7"), "round 7 of"),
    ):
        done = bootstrap("decide", *arguments, "--lake", made.uri, cwd=folder)
        assert done.returncode == 2
        assert said in done.stderr, done.stderr
    assert len(list_parts(made, "decisions", 1)) == 1


def test_sweep_prints_draws_and_gives_rows(made: Lake, tmp_path: Path) -> None:
    for part in list_parts(made, "canaries"):
        drop_part(made, part)
    drawing = tmp_path / "sweep.svg"
    said = _run(
        made, "sweep", "--over", "threshold=0.25:0.75:0.25", "--json", "--plot", str(drawing)
    )
    rows = json.loads(said)
    assert [row["value"] for row in rows] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    for row in rows:
        sql = f"SELECT count(*) AS n FROM scores JOIN captions USING (caption_id) WHERE source = '{row['source']}' AND itm_prob >= {row['value']}"
        assert query(made, sql).to_pylist() == [{"n": row["kept"]}]
        assert row["noise_left"] is None, "without canaries nothing is said of noise"
    assert drawing.read_text().count("<polyline") == 2
    assert "not known" in _run(made, "sweep", "--over", "share=0.1,0.5", "--policy", "percentile")


def test_sweep_estimates_noise_where_there_are_canaries(made: Lake) -> None:
    texts = [("true", True, i / 40 + 0.5) for i in range(20)]
    texts += [(kind, False, i / 40) for kind in ("random", "hard") for i in range(20)]
    rows = [
        {
            "caption_id": f"{kind}{i}", "image_id": f"i{i}", "kind": kind, "truth": truth, "stratum": "short",
            "caption": "x", "model_id": "f", "itm_prob": prob, "itc_sim": prob, "judge_id": "j", "round": 1,
        }
        for i, (kind, truth, prob) in enumerate(texts)
    ]  # fmt: skip
    commit_part(
        made, "canaries", "c", rows_table("canaries", rows), round=1, basis=basis_of("c", 1, {}, [])
    )
    with connect(made) as con:
        assert noise_estimate(con, 1, [0.5]) is not None
    rows = json.loads(_run(made, "sweep", "--over", "threshold=0.1:0.9:0.4", "--json"))
    for source in ("web", "synthetic"):
        left = [row["noise_left"] for row in rows if row["source"] == source]
        assert left[0] > left[1] >= left[2] >= 0, "a higher bar leaves less noise"
    assert all(row["noise_left_low"] <= row["noise_left"] <= row["noise_left_high"] for row in rows)
    assert all(row["precision"] == 1 - row["noise_left"] for row in rows)


@pytest.mark.parametrize(
    ("over", "values"),
    [
        ("threshold=0.05:0.95:0.05", [round(0.05 * i, 2) for i in range(1, 20)]),
        ("k=1:3:1", [1.0, 2.0, 3.0]),
        ("share=0.5:0.5:1", [0.5]),
        ("ranked_by=itm_prob,itc_sim", ["itm_prob", "itc_sim"]),
        ("share=0.1,0.7", [0.1, 0.7]),
    ],
)
def test_values_of_a_range_include_both_ends(over: str, values: list) -> None:
    assert values_of(over) == (over.partition("=")[0], values)


@pytest.mark.parametrize(
    "over", ["threshold", "=1", "t=", "t=1:0:0.1", "t=0:1:0", "t=0:1", "t=0:1:x", "t=0:1:1e-9", "t=nan:1:1"]
)  # fmt: skip
def test_values_of_what_is_no_range_is_refused(over: str) -> None:
    with pytest.raises(SettingsError, match=r"give NAME=FROM:TO:STEP"):
        values_of(over)


def test_why_is_said_in_words_and_as_json(made: Lake) -> None:
    row = query(
        made, "SELECT image_id, caption_id, url FROM verdicts ORDER BY 1, 2 LIMIT 1"
    ).to_pylist()[0]
    words = _run(made, "why", row["url"])
    found = json.loads(_run(made, "why", row["image_id"], "--json"))
    for text in found["images"][0]["texts"]:
        assert f"{text['source']} text {text['caption_id']}" in words
        assert text["decisions"][0]["reason"] in words
    done = bootstrap("why", "nothing", "--lake", made.uri, cwd=Path(made.uri).parent)
    assert (done.returncode, "nothing in" in done.stderr) == (2, True)


def test_sql_writes_files_outside_the_lake_and_nothing_inside(made: Lake, tmp_path: Path) -> None:
    sql = "SELECT caption_id, itm_prob FROM scores ORDER BY caption_id"
    expected = query(made, sql)
    out = tmp_path / "answer.parquet"
    _run(
        made,
        "sql",
        sql,
        "--format",
        "parquet",
        "--out",
        str(out),
        "--memory-limit",
        "200MB",
        "--threads",
        "1",
    )
    assert pq.read_table(out).equals(expected)
    _run(made, "sql", sql, "--format", "json", "--out", str(tmp_path / "answer.json"))
    assert json.loads((tmp_path / "answer.json").read_text()) == expected.to_pylist()
    _run(made, "sql", sql, "--format", "csv", "--out", str(tmp_path / "answer.csv"))
    assert len((tmp_path / "answer.csv").read_text().splitlines()) == expected.num_rows + 1
    for arguments, said in (
        (("--format", "parquet"), "needs --out FILE"),
        (("--out", f"{made.uri}/x.csv", "--format", "csv"), "is inside the lake"),
        (("--out", str(tmp_path / "no" / "x.csv"), "--format", "csv"), "there is no folder"),
        (("--memory-limit", "lots"), "lots"),
        (("--threads", "0"), "threads must be 1 or more"),
    ):
        done = bootstrap("sql", sql, *arguments, "--lake", made.uri, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
    assert not list(tmp_path.glob("_tmp-*"))


def test_ctrl_c_ends_the_query_and_not_the_prompt(
    made: Lake, request: pytest.FixtureRequest
) -> None:
    prompt = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "sql", "--lake", made.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=command_environment() | {"PYTHONUNBUFFERED": "1"},
        cwd=Path(made.uri).parent,
        # A shell's background jobs, and so their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    request.addfinalizer(prompt.kill)
    assert prompt.stdin is not None
    assert prompt.stdout is not None
    prompt.stdin.write("SELECT 'asked' AS first;\n")
    while "asked" not in prompt.stdout.readline():
        pass
    # More than any machine counts in the test's time.
    endless = "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE a.range * b.range % 7 = 3;"
    prompt.stdin.write(endless + "\n")
    answered = threading.Event()

    def press() -> None:
        """Ctrl-C until it is answered: on a busy machine nobody knows when the query has begun."""
        for _ in range(60):
            if answered.wait(2):
                return
            prompt.send_signal(signal.SIGINT)
        prompt.kill()

    pressing = threading.Thread(target=press)
    pressing.start()
    lines = iter(prompt.stdout.readline, "")
    assert any("the query was interrupted" in line for line in lines)
    answered.set()
    pressing.join()
    answer, _ = prompt.communicate("SELECT 6 * 7 AS second;\n", timeout=60)
    assert "42" in answer
    assert prompt.returncode == 0


def test_policies_are_listed_with_what_they_take(tmp_path: Path) -> None:
    said = bootstrap("policies", cwd=tmp_path).stdout
    assert "top_k: The k best texts of each image" in said
    assert "    k: a whole number from 1 to 1000, 2 when not given: texts kept for an image" in said


def test_stage_of_a_finished_round_leaves_what_was_chosen_by_hand(made: Lake) -> None:
    run = Run(made, parse_settings({"preset": None, "machine": {"lake": made.uri}}), 1)
    own, raw = decide_round(run), decide(made, 1, "raw")
    record = rounds.begin_round(made, 1, {})
    for status, counts in (("promoted", raw.name), ("running", own.name)):
        rounds.write_round(made, dataclasses.replace(record, status=status))
        assert decide_round(run) == own
        now = active_generation(made, 1)
        assert now is not None
        assert (now.generation, now.of_round) == (counts, own.name)
