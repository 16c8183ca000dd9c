import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rounds_of_rows import BASIS, caption, pair, scored, write_world

from storage import layout, registry, rounds
from storage.catalog import VIEWS, connect, query, stream, write_catalog
from storage.errors import CorruptPart, QueryRefused, StorageError
from storage.lake import Lake
from storage.policy import decide
from storage.schemas import TABLES
from storage.tables import PartRef, commit_part, drop_part, list_parts, read_part, rows_table


@pytest.fixture
def decided(lake: Lake) -> Lake:
    write_world(lake)
    decide(lake, 1)
    return lake


@pytest.mark.parametrize("view", [*TABLES, *VIEWS])
def test_view_answers_with_the_same_columns_when_the_lake_is_empty(
    local_lake: Lake, view: str
) -> None:
    empty = query(local_lake, f"FROM {view}")
    write_world(local_lake)
    decide(local_lake, 1)
    full = query(local_lake, f"FROM {view}")
    assert empty.schema.names == full.schema.names
    assert [str(t) for t in empty.schema.types] == [str(t) for t in full.schema.types]


def _without(lake: Lake, ref: PartRef, column: str) -> None:
    """Make a part what an older program committed: one column less."""
    data, manifest = read_part(lake, ref), layout.part_manifest(ref.table, ref.name, ref.round)
    buffer = pa.BufferOutputStream()
    pq.write_table(data.drop_columns([column]), buffer)
    old = buffer.getvalue().to_pybytes()
    lake.root.write_bytes(ref.path, old)
    record = json.loads(lake.root.read_bytes(manifest))
    record |= {"num_bytes": len(old), "sha256": hashlib.sha256(old).hexdigest()}
    lake.root.write_bytes(manifest, json.dumps(record).encode())


def test_parts_without_a_column_that_was_added_later_have_null_there(local_lake: Lake) -> None:
    parts = []
    for round in (1, 2):
        row = {"round": round, "model_id": "m", "dataset": "heldout", "metric": "x", "value": 0.5}
        rows = rows_table("metrics", [row | {"low": 0.25, "protocol": "zero-shot"}])
        parts.append(commit_part(local_lake, "metrics", "p", rows, round=round, basis=BASIS))
    asked = "SELECT round, value, low, protocol FROM metrics ORDER BY round"

    def answers() -> list[tuple]:
        return [tuple(row.values()) for row in query(local_lake, asked).to_pylist()]

    _without(local_lake, parts[0], "protocol")
    assert answers() == [(1, 0.5, 0.25, None), (2, 0.5, 0.25, "zero-shot")]
    _without(local_lake, parts[1], "protocol")
    assert answers() == [(1, 0.5, 0.25, None), (2, 0.5, 0.25, None)]
    path = write_catalog(local_lake)
    assert path is not None
    with duckdb.connect(local_lake.root.path(path), read_only=True) as con:
        assert con.sql(asked).fetchall() == answers()


def test_compare_rounds_takes_the_new_model_and_not_a_filter_measured_beside_it(
    local_lake: Lake,
) -> None:
    rounds.begin_round(local_lake, 1, {})
    for model_id, role in (("whole", "med"), ("judge", "filter")):
        row = {"model_id": model_id, "role": role, "round": 1, "path": f"models/{model_id}"}
        rows = rows_table("models", [row])
        commit_part(local_lake, "models", model_id, rows, round=1, basis=BASIS)
    names = ("round", "model_id", "dataset", "metric", "value")
    measured = [("whole", 0.5), ("judge", 0.9)]
    rows = [
        dict(zip(names, (1, model_id, "heldout", "mean_recall", value), strict=True))
        for model_id, value in measured
    ]
    commit_part(local_lake, "metrics", "p", rows_table("metrics", rows), round=1, basis=BASIS)
    found = query(local_lake, "SELECT best_mean_recall FROM compare_rounds").to_pylist()
    assert found == [{"best_mean_recall": 0.5}]


def test_clean_and_rejected_split_the_round_without_held_out_images(decided: Lake) -> None:
    clean = query(decided, 'SELECT caption_id, shard, "offset", size FROM clean').to_pylist()
    assert {r["caption_id"] for r in clean} == {"w0", "w3", "s0"}
    assert {"caption_id": "w3", "shard": "s", "offset": 1536, "size": 100} in clean
    rejected = query(decided, "SELECT caption_id, reason FROM rejected").to_pylist()
    assert {r["caption_id"]: r["reason"] for r in rejected} == {
        "w1": "itm_prob 0.1000 < 0.5",
        "s1": "not scored: cannot decode",
        "s3": "not scored",
    }


def test_connect_as_of_a_round_shows_what_it_took_in_and_made(decided: Lake) -> None:
    tables = ("pairs", "captions", "scores", "decisions", "funnel")
    with connect(decided) as con:
        then = {table: con.sql(f"FROM {table} ORDER BY ALL").fetchall() for table in tables}
    later = "web-0002-00-00000"
    pairs = [pair(6, status="http_4xx"), pair(5) | {"shard": later}]
    for table, round, rows in (
        ("pairs", None, pairs),
        ("captions", 0, [caption("w5", 5, "web", 0)]),
        ("captions", 2, [caption("s5", 5, "synthetic", 2)]),
        ("scores", 2, [scored("w5", 5, 0.9, 2), scored("s5", 5, 0.9, 2)]),
    ):
        commit_part(decided, table, later, rows_table(table, rows), round=round, basis=BASIS)
    decide(decided, 2)
    for as_of, is_same in ((1, True), (2, False), (None, False)):
        with connect(decided, as_of=as_of) as con:
            for table, rows in then.items():
                found = con.sql(f"FROM {table} ORDER BY ALL").fetchall()
                assert (found == rows) == is_same, (as_of, table)


def test_clean_shows_the_last_decided_round_and_its_own_texts(decided: Lake) -> None:
    # Round 2 proposes a text of round 1 again: it is one caption, not two.
    again = rows_table("captions", [caption("s0", 0, "synthetic", 2)])
    commit_part(decided, "captions", "p", again, round=2, basis=BASIS)
    rescored = [scored("s0", 0, 0.6, 2), scored("w1", 1, 0.95, 2)]
    commit_part(decided, "scores", "p", rows_table("scores", rescored), round=2, basis=BASIS)
    decide(decided, 2)
    rows = query(decided, "SELECT round, caption_id, itm_prob FROM clean ORDER BY caption_id")
    assert rows.to_pylist() == [
        {"round": 2, "caption_id": "s0", "itm_prob": 0.6},
        {"round": 2, "caption_id": "w1", "itm_prob": 0.95},
    ]
    assert query(decided, "FROM compare_rounds").num_rows == 0
    rounds.begin_round(decided, 1, {})
    kept = query(decided, "SELECT kept_web, kept_synthetic, share_kept FROM compare_rounds")
    assert kept.to_pylist() == [{"kept_web": 2, "kept_synthetic": 1, "share_kept": 0.5}]


def test_funnel_adds_up_at_every_step(decided: Lake) -> None:
    rows = query(decided, "SELECT stage, outcome, rows FROM funnel WHERE round = 1").to_pylist()
    found = {(r["stage"], r["outcome"]): r["rows"] for r in rows}
    assert found == {
        ("urls", "listed"): 5,
        ("fetched", "ok"): 4,
        ("fetched", "http_4xx"): 1,
        ("texts", "web"): 4,
        ("texts", "synthetic"): 4,
        ("texts", "synthetic, failed"): 1,
        ("scored", "web, ok"): 4,
        ("scored", "synthetic, ok"): 2,
        ("scored", "synthetic, failed"): 1,
        ("scored", "synthetic, not scored"): 1,
        ("decided", "web, kept"): 3,
        ("decided", "web, dropped: itm_prob < 0.5"): 1,
        ("decided", "synthetic, kept"): 1,
        ("decided", "synthetic, dropped: itm_prob < 0.5"): 1,
        ("decided", "synthetic, dropped: not scored: cannot decode"): 1,
        ("decided", "synthetic, dropped: not scored"): 1,
    }


def test_funnel_shows_intake_before_any_round(lake: Lake) -> None:
    commit_part(lake, "pairs", "p", rows_table("pairs", [pair(1)]), basis=BASIS)
    rows = query(lake, "SELECT round, stage, rows FROM funnel").to_pylist()
    assert rows == [
        {"round": 0, "stage": "urls", "rows": 1},
        {"round": 0, "stage": "fetched", "rows": 1},
    ]


def test_noise_is_the_share_dropped_by_source(decided: Lake) -> None:
    rows = query(
        decided, "SELECT source_name, texts, share_dropped FROM noise WHERE source = 'web'"
    ).to_pylist()
    assert rows == [
        {"source_name": "shop", "texts": 2, "share_dropped": 0.5},
        {"source_name": "blog", "texts": 1, "share_dropped": 0.0},
    ]


def test_why_tells_all_of_a_url_that_came_in_and_of_one_that_did_not(decided: Lake) -> None:
    sql = "SELECT caption_id, kept, status FROM why WHERE url = $url AND pool = 'web' ORDER BY 1"
    came = query(decided, sql, {"url": "http://x/1.jpg"}).to_pylist()
    assert [(r["caption_id"], r["kept"]) for r in came] == [
        ("s-failed", None),
        ("s1", False),
        ("w1", False),
    ]
    dead = query(decided, sql, {"url": "http://x/4.jpg"}).to_pylist()
    assert dead == [{"caption_id": None, "kept": None, "status": "http_4xx"}]


def test_models_view_tells_which_were_promoted(local_lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    ref = registry.register(
        local_lake,
        tmp_path,
        role="med",
        round=1,
        parent_id=None,
        trained_on=None,
        config={},
    )
    assert query(local_lake, "SELECT promoted FROM models").to_pylist() == [{"promoted": False}]
    record = rounds.begin_round(local_lake, 1, {})
    changed = {"status": "promoted", "champion_after": ref.model_id}
    rounds.write_round(
        local_lake,
        rounds.RoundRecord(round=1, started_at=record.started_at, **changed),  # type: ignore[arg-type]
    )
    assert query(local_lake, "SELECT promoted FROM models").to_pylist() == [{"promoted": True}]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{root}/tables/x.parquet'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{root}/x.csv'",
        "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{root}/x.csv'",
        "explain\nanalyze\ncopy (SELECT 1) TO '{root}/x.csv'",
        "EXPLAIN/**/ANALYZE COPY (SELECT 1) TO '{root}/x.csv'",
        "EXPORT DATABASE '{root}/dump'",
        "ATTACH '{root}/other.duckdb'",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW clean",
        "INSERT INTO pairs VALUES (1)",
        "SET threads = 1",
        "PRAGMA enable_profiling",
        "INSTALL httpfs",
        "SELECT 1; SELECT 2",
        "",
        "SELEKT 1",
        "FROM read_csv('/etc/passwd')",
        "FROM read_text('/etc/hostname')",
        "SELECT * FROM nowhere",
        "FROM '/etc/passwd'",
        "FROM read_blob('/etc/hostname')",
        "FROM read_text('{root}/../beside.txt')",
        "FROM glob('/etc/*')",
        "FROM sniff_csv('/etc/passwd')",
        "FROM parquet_metadata('/tmp/x.parquet')",
        "FROM read_text('/proc/self/environ')",
        "FROM read_csv('/dev/stdin')",
        "FROM 'http://127.0.0.1:9/x.csv'",
        "FROM duckdb_secrets()",
        "FROM query('COPY (SELECT 1) TO ''{root}/x.csv''')",
        "SELECT getenv('HOME')",
        "LOAD httpfs",
        "CALL pragma_version()",
        "FROM before",
    ],
)
def test_query_refuses_what_writes_leaves_the_lake_or_fails(local_lake: Lake, sql: str) -> None:
    Path(local_lake.uri).with_name("beside.txt").write_text("secret")
    # A table of this name, so that one of the queries could find it.
    before = pa.table({"path": local_lake.root.list_recursive("")})
    with pytest.raises(QueryRefused):
        query(local_lake, sql.format(root=local_lake.uri))
    assert local_lake.root.list_recursive("") == before.column(0).to_pylist()


@pytest.mark.parametrize("sql", ["FROM read_text('/etc/hostname')", "COPY (SELECT 1) TO '/tmp/x'"])
def test_query_is_fenced_on_a_remote_lake_too(tmp_path: Path, sql: str) -> None:
    lake = Lake.open(f"memory://{tmp_path.name}", create=True)
    with pytest.raises(QueryRefused):
        query(lake, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "WITH t AS (SELECT 1) FROM t",
        "FROM clean",
        "DESCRIBE clean",
        "SUMMARIZE pairs",
        "SHOW TABLES",
        "VALUES (1)",
        "EXPLAIN SELECT 1",
        "SELECT count(*) FROM clean; ",
    ],
)
def test_query_answers_what_only_reads(local_lake: Lake, sql: str) -> None:
    assert query(local_lake, sql).num_columns > 0


def test_stream_gives_the_schema_first(local_lake: Lake) -> None:
    batches = list(stream(local_lake, "SELECT range AS n FROM range(25000)"))
    assert batches[0].num_rows == 0
    assert batches[0].schema.names == ["n"]
    assert sum(b.num_rows for b in batches) == 25_000


def test_connect_names_a_torn_part(decided: Lake) -> None:
    ref = list_parts(decided, "scores")[0]
    decided.root.write_bytes(ref.path, b"")
    with pytest.raises(CorruptPart, match=ref.path):
        connect(decided)


def test_views_show_committed_parts_only(decided: Lake) -> None:
    decided.root.remove(layout.part_manifest("scores", "p", 1))
    decided.root.write_bytes("tables/scores/round=0001/stray.parquet", b"")
    assert query(decided, "FROM scores").num_rows == 0


def test_catalog_file_opens_elsewhere_and_is_replaced(local_lake: Lake) -> None:
    write_world(local_lake)
    for expected in (0, 4):
        assert write_catalog(local_lake) == layout.CATALOG
        path = local_lake.root.local_path(layout.CATALOG)
        code = (
            f"import duckdb; con = duckdb.connect({str(path)!r}, read_only=True); "
            "print(con.sql('SELECT count(*) FROM verdicts').fetchall()[0][0])"
        )
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
        )
        # Eight texts, two of them of a held-out image.
        assert said.stdout.strip() == str(6 if expected else 0)
        decide(local_lake, 1)
    assert local_lake.root.sweep("") == 0


def test_connect_spills_within_its_memory_limit(local_lake: Lake) -> None:
    with connect(local_lake, memory_limit="64MB", threads=1) as con:
        limit = con.execute("SELECT current_setting('memory_limit')").fetchall()[0][0]
        assert limit == "61.0 MiB"
        sql = "SELECT count(*) FROM (SELECT DISTINCT hash(range) FROM range(4_000_000))"
        assert con.execute(sql).fetchall() == [(4_000_000,)]
    assert isinstance(con, duckdb.DuckDBPyConnection)


def test_policies_names_every_set_of_decisions_and_which_one_counts(decided: Lake) -> None:
    own = decide(decided, 1)
    other = decide(decided, 1, "raw", activate=False)
    asked = "SELECT generation, counts, of_round, kept, kept_web FROM policies"
    assert [tuple(row.values()) for row in query(decided, asked).to_pylist()] == [
        (own.name, True, True, 4, 3),
        (other.name, False, False, 4, 4),
    ]
    decide(decided, 1, "raw")
    assert [tuple(row.values())[:3] for row in query(decided, asked).to_pylist()] == [
        (other.name, True, False),
        (own.name, False, True),
    ]


def test_macros_answer_what_views_answer(decided: Lake) -> None:
    own, other = decide(decided, 1), decide(decided, 1, "raw", activate=False)
    for macro, same in (
        ("kept(1)", "clean"),
        ("dropped(1)", "rejected"),
        (f"verdicts_of(1, '{own.name}')", "verdicts"),
    ):
        left, right = (query(decided, f"FROM {each} ORDER BY caption_id") for each in (macro, same))
        assert left.num_rows
        assert left.equals(right), macro
    of_raw = query(decided, f"SELECT caption_id FROM verdicts_of(1, '{other.name}') WHERE kept")
    assert set(of_raw.column(0).to_pylist()) == {"w0", "w1", "w3"}
    both = f"'{own.name}', '{other.name}'"
    changed = query(decided, f"SELECT caption_id, kept_by_one FROM changed(1, {both})").to_pylist()
    assert {tuple(row.values()) for row in changed} == {("w1", False), ("s0", True)}
    image_id = pair(0)["image_id"]
    texts = query(decided, f"SELECT caption_id, generation FROM texts_of('{image_id}')")
    assert texts.num_rows == 4, "two texts, each decided twice"
    near = query(decided, "SELECT caption_id FROM borderline(1, 0.5, 0.25)").column(0).to_pylist()
    assert near == ["w3", "s0"]


def test_decisions_of_an_older_lake_are_their_policys_generation(local_lake: Lake) -> None:
    write_world(local_lake)
    ref = decide(local_lake, 1)
    rows = read_part(local_lake, ref)
    drop_part(local_lake, ref)
    old = commit_part(local_lake, "decisions", "blip", rows, round=1, basis=BASIS)
    _without(local_lake, old, "generation")
    local_lake.root.write_bytes(layout.round_policy(1), b'{"policy": "blip"}')
    asked = "SELECT DISTINCT policy, generation FROM clean"
    assert query(local_lake, asked).to_pylist() == [{"policy": "blip", "generation": "blip"}]
    assert query(local_lake, "FROM clean").num_rows == 3
    other = decide(local_lake, 1, params={"threshold": 0.85})
    assert query(local_lake, asked).to_pylist() == [{"policy": "blip", "generation": other.name}]
    found = query(local_lake, "SELECT generation, counts, of_round FROM policies").to_pylist()
    assert found[1] == {"generation": "blip", "counts": False, "of_round": True}


def test_reader_sees_whole_parts_only_while_a_run_writes(decided: Lake) -> None:
    """A 0-byte part, half a part and a half-written file lie around, and parts come all the while."""
    (ref,) = list_parts(decided, "scores", 1)
    half = decided.root.read_bytes(ref.path)[:100]
    for table in ("scores", "decisions"):
        for name, data in (("web-x", b""), ("web-y", half), ("_tmp-abc-web-z", half)):
            decided.root.write_bytes(f"tables/{table}/round=0001/{name}.parquet", data)
    expected = query(decided, "SELECT count(*) AS n FROM decisions").to_pylist()[0]["n"]
    stop, failures, answers = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                rows = query(decided, "SELECT generation, count(*) AS n FROM decisions GROUP BY 1")
                answers.append({row["generation"]: row["n"] for row in rows.to_pylist()})
            except (StorageError, OSError) as err:
                failures.append(err)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(12):
        decide(decided, 1, params={"threshold": number / 20}, activate=number % 2 == 0)
    stop.set()
    reader.join()
    assert not failures
    assert len(answers) > 2
    assert all(set(answer.values()) == {expected} for answer in answers), answers
