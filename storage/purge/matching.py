"""Which input rows are meant: those asked for, every copy of their pictures, every row of the addresses of these.

The rows stay in DuckDB, which spills to disk; what Python looks at are the different hosts, and the addresses of the
hosts that are asked for.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from storage import addresses
from storage.lake import Lake
from storage.parts_sql import rows_of
from storage.purge.request import Asked, Request
from storage.schemas import PURGED_STATUS
from storage.tables import list_parts

SAME_PICTURE = "the same picture"
SAME_ADDRESS = "the address of the same picture"
"""`asked` of rows that nobody named."""

_BATCH = 50_000

_AUTHORITY = r"regexp_extract(url, '^\s*[^:/?#]+://([^/?#]*)', 1)"

_TABLES = f"""
CREATE TEMP VIEW listed AS SELECT *,
    CASE pool WHEN 'web' THEN {_AUTHORITY} ELSE '' END AS authority
FROM ({{pairs}});
CREATE TEMP TABLE seeds (part VARCHAR, key VARCHAR, asked VARCHAR);
CREATE TEMP TABLE authorities AS SELECT '' AS authority, '' AS asked WHERE false;
"""
_CHOSEN = f"""
CREATE TEMP TABLE chosen AS
SELECT l.part, l.pool, l.key, l.row, l.url, l.image_id, l.status, l.alt_text, s.asked,
    -- A duplicate names the place of the image that an earlier row stored.
    CASE l.status WHEN 'ok' THEN l.shard END AS shard,
    CASE l.status WHEN 'ok' THEN l."offset" END AS "offset",
    CASE l.status WHEN 'ok' THEN l.size END AS size
FROM listed l JOIN (SELECT part, key, min(asked) AS asked FROM seeds GROUP BY ALL) s USING (part, key)
WHERE l.status <> '{PURGED_STATUS}'
"""


class Matches:
    """The rows that a request means, as tables `chosen` (rows of pairs) and `purging` (their image ids)."""

    def __init__(self, con: duckdb.DuckDBPyConnection, lake: Lake, request: Request) -> None:
        self._con = con
        pairs = rows_of(lake, "pairs", list_parts(lake, "pairs"), named=True)
        con.execute(_TABLES.format(pairs=pairs))
        self._seed(request)
        self.unmatched: list[Asked] = self._unmatched(request)
        self._spread()
        con.execute(_CHOSEN)
        con.execute(
            "CREATE TEMP TABLE purging AS SELECT DISTINCT image_id FROM chosen "
            "WHERE image_id IS NOT NULL ORDER BY image_id"
        )

    @property
    def num_rows(self) -> int:
        """Input rows that are to be purged."""
        return int(self._con.execute("SELECT count(*) FROM chosen").fetchall()[0][0])

    @property
    def already(self) -> pa.Table:
        """key, url and image_id of rows that are meant and were purged before."""
        return self._con.sql(
            "SELECT DISTINCT key, url, image_id FROM listed SEMI JOIN seeds USING (part, key) "
            f"WHERE status = '{PURGED_STATUS}' ORDER BY ALL"
        ).to_arrow_table()

    def image_ids(self) -> pa.Array:
        """The images, sorted."""
        table = self._con.sql("SELECT image_id FROM purging ORDER BY image_id").to_arrow_table()
        return table.column(0).combine_chunks().cast(pa.string())

    def look_alikes(self, most: int = 20) -> list[tuple[str, str]]:
        """(image_id, url) of stored images with the same difference hash and other bytes: not purged, for a person to see."""
        rows = self._con.execute(
            "SELECT image_id, min(url) FROM listed WHERE status = 'ok' AND phash IN (SELECT phash FROM listed "
            "SEMI JOIN purging USING (image_id) WHERE phash IS NOT NULL) AND image_id NOT IN (FROM purging) "
            "GROUP BY image_id ORDER BY image_id LIMIT ?",
            [most],
        )
        return [(image_id, url) for image_id, url in rows.fetchall()]

    def _seed(self, request: Request) -> None:
        """The rows that are named; one that is named twice is there twice."""
        images = {each.value: str(each) for each in request.asked if each.kind == "image"}
        hosts = {each.value: str(each) for each in request.asked if each.kind == "host"}
        texts = {each.text.strip(): str(each) for each in request.asked if each.kind == "url"}
        wanted = {each.value: str(each) for each in request.asked if each.kind == "url"}
        with _lent(self._con, "named", images):
            self._name(
                "SELECT part, key, a.asked FROM listed l JOIN named a ON l.image_id = a.name"
            )
        with _lent(self._con, "named", texts):
            self._name("SELECT part, key, a.asked FROM listed l JOIN named a ON l.url = a.name")
        self._find_hosts(hosts)
        self._name("SELECT part, key, a.asked FROM listed JOIN authorities a USING (authority)")
        with self._by_address(wanted) as found:
            self._name(found)

    def _unmatched(self, request: Request) -> list[Asked]:
        rows = self._con.execute("SELECT DISTINCT asked FROM seeds").fetchall()
        found = {row[0] for row in rows}
        return [each for each in request.asked if str(each) not in found]

    def _spread(self) -> None:
        """Take along every row of the same pictures, and of the addresses that these had."""
        before = -1
        while (now := self._count()) != before:
            before = now
            self._take_along(
                f"SELECT part, key, '{SAME_PICTURE}' FROM listed WHERE image_id IN "
                "(SELECT image_id FROM listed SEMI JOIN seeds USING (part, key) WHERE image_id IS NOT NULL)"
            )
            rows = self._con.execute(
                "SELECT DISTINCT url FROM listed SEMI JOIN seeds USING (part, key) "
                "WHERE pool = 'web' AND image_id IS NOT NULL AND authority NOT IN (SELECT authority FROM authorities)"
            )
            found = {addresses.normal(url) or url for (url,) in _fetched(rows)}
            with self._by_address(dict.fromkeys(found, SAME_ADDRESS)) as more:
                self._take_along(more)

    def _count(self) -> int:
        return int(self._con.execute("SELECT count(*) FROM seeds").fetchall()[0][0])

    def _name(self, sql: str) -> None:
        self._con.execute(f"INSERT INTO seeds SELECT DISTINCT * FROM ({sql})")

    def _take_along(self, sql: str) -> None:
        self._con.execute(
            f"INSERT INTO seeds SELECT part, key, min(asked) FROM ({sql}) AS found(part, key, asked) "
            "ANTI JOIN seeds USING (part, key) GROUP BY ALL"
        )

    def _find_hosts(self, wanted: Mapping[str, str]) -> None:
        """Which spellings of hosts belong to one that is wanted."""
        found = {}
        for authority, host in self._authorities() if wanted else ():
            labels = host.split(".")
            above = (".".join(labels[place:]) for place in range(len(labels)))
            asked = next((wanted[name] for name in above if name in wanted), None)
            if asked is not None:
                found[authority] = asked
        with _lent(self._con, "found", found):
            self._con.execute("INSERT INTO authorities SELECT name, asked FROM found")

    @contextmanager
    def _by_address(self, wanted: Mapping[str, str]) -> Iterator[str]:
        """SQL of the web rows whose address has one of the wanted normal forms, for the length of a block."""
        hosts = {addresses.host_of(f"http://{address}") for address in wanted}
        near = {authority: "" for authority, host in self._authorities() if host in hosts}
        found: list[tuple[str, str, str]] = []
        with _lent(self._con, "near", near):
            rows = self._con.execute(
                "SELECT part, key, url FROM listed WHERE authority IN (SELECT name FROM near)"
            )
            for part, key, url in _fetched(rows):
                asked = wanted.get(addresses.normal(url) or url)
                if asked is not None:
                    found.append((part, key, asked))
        columns = list(zip(*found, strict=True)) if found else [(), (), ()]
        arrays = [pa.array(column, pa.string()) for column in columns]
        self._con.register("by_address", pa.table(arrays, ["part", "key", "asked"]))
        yield "SELECT part, key, asked FROM by_address"
        self._con.unregister("by_address")

    def _authorities(self) -> Iterator[tuple[str, str]]:
        """(spelling, host) of every host that web rows name."""
        rows = self._con.execute("SELECT DISTINCT authority FROM listed WHERE authority <> ''")
        for (authority,) in _fetched(rows):
            host = addresses.host_of(f"http://{authority}/")
            if host is not None:
                yield authority, host


class _lent:
    """Names with what was asked, as a table for the length of a block."""

    def __init__(self, con: duckdb.DuckDBPyConnection, name: str, rows: Mapping[str, str]) -> None:
        self._con, self._name = con, name
        columns = [pa.array(list(rows), pa.string()), pa.array(list(rows.values()), pa.string())]
        self._table = pa.table(columns, ["name", "asked"])

    def __enter__(self) -> None:
        self._con.register(self._name, self._table)

    def __exit__(self, *about: object) -> None:
        self._con.unregister(self._name)


def _fetched(rows: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, ...]]:
    """The rows of a result, some at a time; the connection must not be asked anything else meanwhile."""
    while batch := rows.fetchmany(_BATCH):
        yield from batch
