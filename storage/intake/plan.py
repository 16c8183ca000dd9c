"""The plan of an intake: the user's list, read once, sorted into what to fetch and what not.

Lists may be larger than memory: they go through a Parquet file on this machine's disk, and DuckDB
finds what is known and what repeats.
"""

import json
import logging
import urllib.parse
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import duckdb
import idna
import pyarrow as pa
import pyarrow.parquet as pq

from storage import addresses, catalog, ids
from storage.intake.fetching.errors import NO_ANSWER, TRANSIENT, TRANSIENT_4XX
from storage.intake.purged import has_purges
from storage.intake.url_list import ListRow, UrlListConfig, open_list
from storage.lake import Lake
from storage.parts_sql import quoted, rows_of
from storage.tables import PartRef

logger = logging.getLogger(__name__)

LISTED = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("source_name", pa.string()),
        ("url", pa.string()),
        ("fetch_url", pa.string()),
        ("alt_text", pa.string()),
        ("licence", pa.string()),
        ("extra", pa.string()),
        ("bad_text", pa.string()),
        ("bad_url", pa.string()),
        ("address", pa.string()),
        ("host", pa.string()),
    ]
)
"""The last two are only filled in where something was purged, for there they are looked for."""


_MAY_PASS = f"""(
    status IN ({", ".join(map(quoted, TRANSIENT))})
    OR (status = 'http_4xx' AND left(reason, 3) IN ({", ".join(map(quoted, TRANSIENT_4XX))}))
    OR (status = 'dns' AND contains(reason, {quoted(NO_ANSWER)}))
)"""
"""`is_transient` in SQL."""


class Plan:
    """Numbered rows of a list that are new to the lake, on disk."""

    def __init__(self, path: Path, num_listed: int) -> None:
        self.path = path
        self.num_rows: int = pq.read_metadata(path).num_rows
        self.num_known = num_listed - self.num_rows
        """Rows that the lake has from an earlier round."""

    def num_again(self) -> int:
        """Rows that an earlier round asked for in vain, and that are asked for again."""
        with duckdb.connect() as con:
            sql = "SELECT count(*) FROM read_parquet($path) WHERE is_again AND status IS NULL"
            return int(con.execute(sql, {"path": str(self.path)}).fetchall()[0][0])

    def rows(self, begin: int, end: int) -> list[dict[str, Any]]:
        """Rows begin to end - 1; keep it to a shard's worth."""
        with duckdb.connect() as con:
            rows = con.sql(
                "SELECT * FROM read_parquet($path) WHERE n >= $begin AND n < $end ORDER BY n",
                params={"path": str(self.path), "begin": begin, "end": end},
            )
            return cast(list[dict[str, Any]], rows.to_arrow_table().to_pylist())

    def write_fetch_list(self, path: Path, ranges: list[tuple[int, int]], shard_rows: int) -> None:
        """A Parquet file (row, url) of what is to be fetched in ranges of row numbers.

        Rows of one shard stay together, and within a shard the hosts take turns: a host that has to be waited for
        holds up its own rows, not a whole shard's.
        """
        tmp = path.with_name(f"_tmp-{path.name}")
        with duckdb.connect() as con:
            con.execute(
                f"COPY ({_by_turns(ranges)}) TO '{_escaped(tmp)}' (FORMAT parquet)",
                {"source": str(self.path), "shard_rows": shard_rows},
            )
        tmp.replace(path)

    def is_listed(self, path: Path, ranges: list[tuple[int, int]]) -> bool:
        """Whether a fetch list has all that is to be fetched in ranges of row numbers."""
        sql = (
            f"SELECT count(*) FROM ({_to_fetch(ranges)}) ANTI JOIN read_parquet($list) USING (row)"
        )
        with duckdb.connect() as con:
            found = con.execute(sql, {"source": str(self.path), "list": str(path)}).fetchall()
        return int(found[0][0]) == 0


def make_plan(
    lake: Lake,
    config: UrlListConfig,
    earlier: list[PartRef],
    folder: Path,
    *,
    placeholder_most: int | None = None,
    again: int = 0,
) -> Plan:
    """Read the list and write its plan into `folder`; `earlier` are pairs of other rounds.

    A text that is found under more than `placeholder_most` addresses is a placeholder; none is when that is None.
    What failed in an earlier round and may come another time is planned again, in so many rounds.
    """
    listed, plan = folder / "listed.parquet", folder / "plan.parquet"
    num_listed = _write_listed(config, listed, with_hosts=has_purges(lake))
    with catalog.connect(lake) as con:
        con.execute(f"CREATE TEMP VIEW listed AS FROM read_parquet('{_escaped(listed)}')")
        con.execute(f"CREATE TEMP VIEW known AS {rows_of(lake, 'pairs', earlier)}")
        _find_placeholders(con, placeholder_most)
        con.execute(f"CREATE TEMP MACRO may_pass(status, reason) AS {_MAY_PASS}")
        sql = files("storage").joinpath("intake", "plan.sql").read_text("utf-8")
        con.execute(sql, {"again": again})
        con.execute(f"COPY (FROM plan ORDER BY n) TO '{_escaped(plan)}' (FORMAT parquet)")
    made = Plan(plan, num_listed)
    listed.unlink()
    logger.info("%s: %d rows, %d of them known", config.path, num_listed, made.num_known)
    return made


def _find_placeholders(con: duckdb.DuckDBPyConnection, most: int | None) -> None:
    """The macro `form_of` and the table `placeholders`: forms of texts that are under more than `most` addresses.

    Of a text its hash is counted, without case and with simple spaces, so that nothing is held but two numbers a row, and
    DuckDB spills these.
    """
    con.execute(
        r"CREATE TEMP MACRO form_of(a_text) AS hash(lower(trim(regexp_replace(a_text, '\s+', ' ', 'g'))))"
    )
    con.execute("CREATE TEMP TABLE placeholders (form UBIGINT)")
    if most is None:
        return
    con.execute(
        """
        INSERT INTO placeholders
        SELECT form FROM (
            SELECT DISTINCT form_of(alt_text) AS form, hash(address) AS address
            FROM (
                SELECT alt_text, fetch_url AS address FROM listed WHERE bad_text IS NULL AND bad_url IS NULL
                UNION ALL SELECT alt_text, url FROM known
            )
            WHERE alt_text IS NOT NULL AND address IS NOT NULL AND trim(alt_text) <> ''
        )
        GROUP BY form HAVING count(*) > $most
        """,
        {"most": most},
    )


def _to_fetch(ranges: list[tuple[int, int]]) -> str:
    """SQL of (row, url) to be fetched in ranges of row numbers of the plan $source."""
    wanted = " OR ".join(f"(n >= {begin} AND n < {end})" for begin, end in ranges)
    return (
        "SELECT n AS row, fetch_url AS url FROM read_parquet($source) "
        f"WHERE status IS NULL AND ({wanted})"
    )


def _by_turns(ranges: list[tuple[int, int]]) -> str:
    """The same in the order in which it is fetched, for shards of $shard_rows."""
    return f"""
        WITH numbered AS (
            SELECT *, (row_number() OVER (ORDER BY row) - 1) // $shard_rows AS shard,
                lower(regexp_extract(url, '^[^:]+://([^/?#]*)', 1)) AS host
            FROM ({_to_fetch(ranges)})
        )
        SELECT row, url FROM numbered
        ORDER BY shard, row_number() OVER (PARTITION BY shard, host ORDER BY row), row
    """


def _write_listed(config: UrlListConfig, path: Path, *, with_hosts: bool) -> int:
    num_rows = 0
    with pq.ParquetWriter(path, LISTED, compression="zstd") as writer:
        for batch in open_list(config):
            rows = list(_listed(config, batch, with_hosts))
            num_rows += len(rows)
            writer.write_table(pa.Table.from_pylist(rows, schema=LISTED))
    return num_rows


def _listed(
    config: UrlListConfig, batch: list[ListRow], with_hosts: bool
) -> Iterator[dict[str, Any]]:
    for row in batch:
        url, alt_text = row.values.get("url"), row.values.get("alt_text")
        source_name = row.values.get("source_name") or config.name
        # A row without an address still needs a key of its own.
        address = url if url else f"row {row.position}"
        fetch_url, problem = fit_for_http(url)
        yield {
            "row": row.position,
            "key": ids.pair_key(source_name, address, alt_text),
            "source_name": source_name,
            "url": url,
            "fetch_url": fetch_url,
            "alt_text": alt_text,
            "licence": row.values.get("licence"),
            "extra": json.dumps(row.extra, sort_keys=True, default=str) if row.extra else None,
            "bad_text": row.bad,
            "bad_url": problem,
            "address": addresses.normal(url) if with_hosts else None,
            "host": addresses.host_of(url) if with_hosts else None,
        }


def fit_for_http(url: str | None) -> tuple[str | None, str | None]:
    """The address with its host in ASCII and the rest percent-encoded, or what is wrong with it."""
    if not url or not url.strip():
        return None, "no address"
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError as err:
        return None, str(err)
    if parts.scheme.lower() not in ("http", "https") or not host:
        return None, "not an http or https address"
    if not host.isascii():
        try:
            ascii_host = idna.encode(host, uts46=True).decode("ascii")
        except idna.IDNAError as err:
            return None, f"{host[:80]!r} is no host name: {err}"
        user, at, _ = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user}{at}{ascii_host}{f':{port}' if port else ''}")
    return addresses.fit_for_http(parts.geturl()), None


def _escaped(path: Path) -> str:
    return str(path).replace("'", "''")
