"""A policy is tried on made-up texts before it touches a lake: what is wrong with it is said in a second.

The texts have what real ones have: several of an image, none of one source, ties, texts without a number.
"""

from collections.abc import Mapping

import duckdb

from storage.candidates import COLUMNS
from storage.errors import ConfigError
from storage.parts_sql import empty_table
from storage.policy_file import Policy
from storage.policy_header import Value, quoted_line
from storage.policy_run import check_complete, time_limited
from storage.policy_sql import CUTS, MADE_CUTS, ParsedPolicy, bare, failed, parse
from storage.schemas import TABLES

SAMPLE_IMAGES = 300
TIME_LIMIT_S = 20.0
"""For the made-up texts; they take some hundredths of a second."""

_BY_ORDER = {"approx_quantile", "approx_top_k", "reservoir_quantile", "getvariable"}
"""Functions that DuckDB counts as deterministic and whose answer depends on the order of rows, or on a session."""

_SPOKEN = {"current_timestamp", "current_date", "current_time", "localtime", "localtimestamp"}
"""Clock readings without brackets, which the parser takes for columns."""

_TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "repeat", "repeat_row"}

_SAMPLE = f"""
CREATE TABLE sample AS
WITH image AS (
    SELECT i, md5('image ' || i) AS image_id, ['shop', 'blog', 'museum'][i % 3 + 1] AS source_name
    FROM range({SAMPLE_IMAGES}) t(i)
), texts AS (
    SELECT i, image_id, source_name, 'web' AS source, 0 AS n FROM image WHERE i % 11 <> 0
    UNION ALL
    SELECT i, image_id, source_name, 'synthetic', n FROM image, range(3) t(n) WHERE i % 7 <> 0 AND n <= i % 3
)
SELECT
    md5(image_id || source || n) AS caption_id, image_id, source,
    'a ' || source || ' text, "' || n || '" of ' || i || ': 100 % wool' AS caption,
    -- Two decimals make ties; 0 and 1 are among them.
    CASE WHEN (i + n) % 17 > 1 THEN ((i * 37 + n * 11) % 101) / 100.0::DOUBLE END AS itm_prob,
    CASE WHEN (i + n) % 17 > 1 THEN ((i * 53 + n * 29) % 101) / 100.0::DOUBLE - 0.3 END AS itc_sim,
    CASE (i + n) % 17 WHEN 0 THEN 'decode_error' WHEN 1 THEN NULL ELSE 'ok' END AS score_status,
    CASE WHEN (i + n) % 17 = 0 THEN 'cannot decode' END AS score_error,
    source_name, i,
    CASE WHEN i % 4 = 0 THEN ((i * 41 + n * 7) % 101) / 100.0::DOUBLE END AS judge_itm_prob,
    CASE WHEN i % 4 = 0 THEN ((i * 43 + n * 13) % 101) / 100.0::DOUBLE - 0.3 END AS judge_itc_sim
FROM texts
"""
_TABLES = (
    "INSERT INTO captions BY NAME SELECT caption_id, image_id, source, caption, 'ok' AS status, "
    "CASE source WHEN 'web' THEN 0 ELSE 1 END AS round FROM sample",
    "INSERT INTO scores BY NAME SELECT caption_id, image_id, 'filter' AS model_id, itm_prob, itc_sim, "
    "score_status AS status, score_error AS error, 1 AS round FROM sample WHERE score_status IS NOT NULL",
    "INSERT INTO pairs BY NAME SELECT DISTINCT md5('key ' || i) AS key, 'web' AS pool, i AS row, source_name, "
    "'http://x/' || i AS url, 'alt ' || i AS alt_text, 'ok' AS status, 1 AS attempts, 's' AS shard, "
    'i * 512 AS "offset", 100 AS size, image_id FROM sample',
)
_WANTED = {"caption_id": "VARCHAR", "kept": "BOOLEAN", "reason": "VARCHAR"}
_OPTIONAL = {"image_id": "VARCHAR", "source": "VARCHAR"}


def check_policy(policy: Policy, params: Mapping[str, Value]) -> ParsedPolicy:
    """The policy, parsed; ConfigError or QueryRefused, quoting its line, for one that would not do on real texts.

    It must be one SELECT over tables of the lake, without clock, chance or files; give every text one row with
    caption_id, kept and reason; give the same whatever the order of rows; and end.
    """
    with duckdb.connect(config={"threads": 2, "python_enable_replacements": False}) as con:
        parsed = parse(con, policy)
        _check_parameters(parsed)
        for table, schema in TABLES.items():
            con.execute(f"CREATE TABLE {table} AS {empty_table(schema)}")
        con.execute(_SAMPLE)
        for statement in _TABLES:
            con.execute(statement)
        _check_names(con, parsed)
        with time_limited(policy, TIME_LIMIT_S) as clock:
            clock.watch(con)
            whole = _verdicts(con, parsed, params, "ORDER BY caption_id", threads=1)
            again = _verdicts(con, parsed, params, "ORDER BY hash(caption_id)", threads=4)
            if whole != again:
                raise ConfigError(
                    f"policy {policy.name} is not deterministic: the same texts in another order have other "
                    f"verdicts or reasons ({_first_difference(whole, again)}); order what it ranks by "
                    "caption_id too, and use no first(), list() or row_number() without ORDER BY"
                )
            if policy.header.by_image:
                _check_by_image(con, parsed, params, whole)
    return parsed


def _check_parameters(parsed: ParsedPolicy) -> None:
    """What the SQL names is declared, and what is declared is used."""
    policy = parsed.policy
    declared = {parameter.name: parameter for parameter in policy.header.parameters}
    for name in sorted(parsed.parameters - set(declared)):
        line = next(
            (n for n, text in enumerate(policy.sql.splitlines(), 1) if f"${name}" in text), 1
        )
        raise ConfigError(
            f"policy {policy.name}, {quoted_line(policy.sql, line)}: ${name} is not declared; add a line such as "
            f"`-- parameter {name}: number = 0.5, from 0 to 1: what it means`"
        )
    for name in sorted(set(declared) - parsed.parameters):
        raise ConfigError(
            f"policy {policy.name}, {quoted_line(policy.sql, declared[name].line)}: its SQL does not use ${name}"
        )
    if policy.header.has_cuts and CUTS not in _top_level_ctes(parsed):
        raise ConfigError(
            f"policy {policy.name} decides after cuts, but it has no clause WITH {CUTS} AS (...)"
        )


def _top_level_ctes(parsed: ParsedPolicy) -> set[str]:
    entries = parsed.tree["statements"][0]["node"].get("cte_map", {}).get("map", [])
    return {str(entry["key"]) for entry in entries}


def _check_names(con: duckdb.DuckDBPyConnection, parsed: ParsedPolicy) -> None:
    """No function of time or chance, no file, no table that a lake does not have."""
    policy = parsed.policy
    tables = {"candidates", *TABLES, *parsed.ctes()}
    unstable = {
        row[0]
        for row in con.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        ).fetchall()
    }
    for each in parsed.named():
        why = ""
        if each.kind == "function" and each.name in unstable | _BY_ORDER:
            why = f"{each.name}() gives another answer another time"
        elif each.kind == "column" and each.name in _SPOKEN:
            why = f"{each.name} gives another answer another time"
        elif each.kind == "sample":
            why = "a sample is another one another time"
        elif each.kind == "table function" and each.name not in _TABLE_FUNCTIONS:
            why = f"{each.name}() reads what is not of the lake, and no fingerprint would notice that it changed"
        elif each.kind == "table" and each.name.lower() not in {name.lower() for name in tables}:
            why = f"there is no table {each.name!r} for a policy; there are {', '.join(sorted({'candidates', *TABLES}))}"
        if why:
            raise ConfigError(f"policy {policy.name}, {quoted_line(policy.sql, each.line)}: {why}")


def _verdicts(
    con: duckdb.DuckDBPyConnection,
    parsed: ParsedPolicy,
    params: Mapping[str, Value],
    how: str,
    *,
    threads: int,
    sql: str | None = None,
) -> list[tuple[object, ...]]:
    """Run the policy on the sample, its rows read as `how` says; its verdicts by caption_id."""
    policy = parsed.policy
    con.execute(f"SET threads = {threads}")
    con.execute(
        f"CREATE OR REPLACE TABLE candidates AS SELECT {', '.join(COLUMNS)} FROM sample {how}"
    )
    text = sql or bare(policy.sql)
    named = con.extract_statements(text)[0].named_parameters
    try:
        con.execute(
            f"CREATE OR REPLACE TABLE verdict AS FROM (\n{text}\n)",
            {name: params[name] for name in named} or None,
        )
    except duckdb.InterruptException:
        raise
    except duckdb.Error as err:
        raise failed(policy, err, 1 if sql is None else 10**9) from err
    _check_columns(con, policy)
    check_complete(con, policy)
    return con.execute(
        "SELECT caption_id, kept, reason FROM verdict ORDER BY caption_id"
    ).fetchall()


def _check_columns(con: duckdb.DuckDBPyConnection, policy: Policy) -> None:
    found = {row[0]: row[1] for row in con.execute("DESCRIBE verdict").fetchall()}
    for name, kind in _WANTED.items():
        if name not in found:
            raise ConfigError(
                f"policy {policy.name} gives no column {name}: it gives {', '.join(found)}; each text needs "
                "caption_id, kept and reason"
            )
        if found[name] != kind:
            raise ConfigError(
                f"policy {policy.name} gives {name} as {found[name]}, and it must be {kind}; write "
                f"CAST(... AS {kind})"
            )
    strange = sorted(set(found) - set(_WANTED) - set(_OPTIONAL))
    if strange:
        raise ConfigError(
            f"policy {policy.name} gives a column {strange[0]} that decisions do not have; leave it out"
        )


def _check_by_image(
    con: duckdb.DuckDBPyConnection,
    parsed: ParsedPolicy,
    params: Mapping[str, Value],
    whole: list[tuple[object, ...]],
) -> None:
    """Half of the images, then the other half, must get what all get together."""
    policy, sql = parsed.policy, None
    if policy.header.has_cuts:
        text = parsed.cuts_sql(con)
        named = con.extract_statements(text)[0].named_parameters
        con.execute(
            f"CREATE OR REPLACE TABLE candidates AS SELECT {', '.join(COLUMNS)} FROM sample"
        )
        con.execute(
            f"CREATE OR REPLACE TABLE {MADE_CUTS} AS {text}",
            {name: params[name] for name in named} or None,
        )
        sql = parsed.without_cuts_sql(con)
    halves = []
    for odd in (0, 1):
        halves += _verdicts(con, parsed, params, f"WHERE i % 2 = {odd}", threads=1, sql=sql)
    if (found := sorted(halves)) != whole:
        raise ConfigError(
            f"policy {policy.name} says that it decides image by image, but a text's verdict depends on other "
            f"images ({_first_difference(whole, found)}); leave out its line `-- decides:`, or work out what "
            f"comes from all texts in a clause WITH {CUTS} AS (...)"
        )


def _first_difference(one: list[tuple[object, ...]], other: list[tuple[object, ...]]) -> str:
    for first, second in zip(one, other, strict=False):
        if first != second:
            return f"{first[1:]} and {second[1:]} of the same text"
    return "other texts"
