"""A policy's SQL as DuckDB parses it: what it calls, what it reads, where; and how to run it piece by piece."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from storage.errors import ConfigError, QueryRefused
from storage.policy_file import Policy
from storage.policy_header import quoted_line

CUTS = "cuts"
"""The part of a policy that is worked out from all texts, when the rest goes image by image."""
MADE_CUTS = "made_cuts"

_LINE = re.compile(r"\n*LINE (\d+):.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """Something that a statement names."""

    kind: str
    """function, table function, table, column, sample or every column."""
    name: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedPolicy:
    """One SELECT as a syntax tree."""

    policy: Policy
    tree: dict[str, Any]
    parameters: frozenset[str]

    def named(self) -> Iterator[Named]:
        """Everything that it names, with the line where it does."""
        for kind, name, location in _names(self.tree["statements"]):
            line = self.policy.sql.encode()[:location].count(b"\n") + 1
            yield Named(kind=kind, name=name, line=line)

    def ctes(self) -> set[str]:
        """Names of its WITH clauses, at any depth."""
        return set(_cte_names(self.tree["statements"]))

    def kept_of_a_row(self, con: duckdb.DuckDBPyConnection) -> str | None:
        """SQL of what it calls kept, where that takes a row of `candidates` and nothing else; None otherwise."""
        node = self.tree["statements"][0]["node"]
        plain = node.get("type") == "SELECT_NODE" and not node.get("modifiers")
        source = node.get("from_table") or {}
        plain = (
            plain
            and source.get("type") == "BASE_TABLE"
            and source.get("table_name") == "candidates"
        )
        narrowed = any(
            node.get(name) for name in ("where_clause", "having", "qualify", "group_expressions")
        )
        columns = [each for each in node.get("select_list", []) if each.get("alias") == "kept"]
        if not plain or narrowed or len(columns) != 1 or self.ctes():
            return None
        kept = copy.deepcopy(columns[0]) | {"alias": ""}
        if set(_classes(kept)) & {"WINDOW", "SUBQUERY", "LAMBDA"}:
            return None
        tree = _tree_of(con, "SELECT 1")
        tree["statements"][0]["node"]["select_list"] = [kept]
        tree["statements"][0]["named_param_map"] = self.tree["statements"][0]["named_param_map"]
        return _text_of(con, tree).removeprefix("SELECT ")

    def cuts_sql(self, con: duckdb.DuckDBPyConnection) -> str:
        """The SQL of its `cuts` alone, with the WITH clauses before it."""
        tree = copy.deepcopy(self.tree)
        node = tree["statements"][0]["node"]
        entries = node["cte_map"]["map"]
        upto = next(i for i, entry in enumerate(entries) if entry["key"] == CUTS)
        whole = _tree_of(con, f"WITH {CUTS} AS (SELECT 1) SELECT * FROM {CUTS}")
        whole["statements"][0]["node"]["cte_map"]["map"] = entries[: upto + 1]
        whole["statements"][0]["named_param_map"] = tree["statements"][0]["named_param_map"]
        return _text_of(con, whole)

    def without_cuts_sql(self, con: duckdb.DuckDBPyConnection) -> str:
        """Its SQL, reading the cuts from the table MADE_CUTS in place of working them out."""
        tree = copy.deepcopy(self.tree)
        made = _tree_of(con, f"WITH {CUTS} AS (SELECT * FROM {MADE_CUTS}) SELECT 1")
        entries = tree["statements"][0]["node"]["cte_map"]["map"]
        for entry in entries:
            if entry["key"] == CUTS:
                entry["value"] = made["statements"][0]["node"]["cte_map"]["map"][0]["value"]
        return _text_of(con, tree)


def parse(con: duckdb.DuckDBPyConnection, policy: Policy) -> ParsedPolicy:
    """The policy as one SELECT; QueryRefused quoting the line where it is none."""
    try:
        statements = con.extract_statements(policy.sql)
    except duckdb.Error as err:
        raise QueryRefused(f"policy {policy.name} is not SQL: {located(policy, err, 0)}") from err
    if len(statements) != 1:
        raise QueryRefused(
            f"policy {policy.name} must be one SELECT: there are {len(statements)} statements"
        )
    if statements[0].type != duckdb.StatementType.SELECT:
        raise QueryRefused(
            f"policy {policy.name} must be one SELECT: {statements[0].type.name} statements are refused"
        )
    try:
        tree = _tree_of(con, policy.sql)
    except (duckdb.Error, ValueError) as err:
        raise QueryRefused(
            f"policy {policy.name} must be one SELECT over `candidates`: {err}"
        ) from err
    return ParsedPolicy(
        policy=policy, tree=tree, parameters=frozenset(statements[0].named_parameters)
    )


def bare(sql: str) -> str:
    """A statement that can stand between brackets."""
    return sql.rstrip().rstrip(";")


def located(policy: Policy, err: duckdb.Error, lines_before: int) -> str:
    """What DuckDB says of a policy, with the line of the policy's own file quoted."""
    text = str(err)
    found = _LINE.search(text)
    said = " ".join(_LINE.sub("", text).split())
    if found is None:
        return said
    return f"{said}; {quoted_line(policy.sql, int(found[1]) - lines_before)}"


def failed(policy: Policy, err: duckdb.Error, lines_before: int) -> ConfigError:
    """The error of a policy that DuckDB could not run."""
    return ConfigError(f"policy {policy.name} failed: {located(policy, err, lines_before)}")


def _tree_of(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(
        con.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()[0][0]
    )
    if tree.get("error"):
        raise ValueError(str(tree.get("error_message", "it cannot be read")))
    return tree


def _text_of(con: duckdb.DuckDBPyConnection, tree: dict[str, Any]) -> str:
    return str(con.execute("SELECT json_deserialize_sql($1)", [json.dumps(tree)]).fetchall()[0][0])


def _names(node: Any, location: int = 0) -> Iterator[tuple[str, str, int]]:
    """(kind, name, byte offset) of what a tree names."""
    if isinstance(node, list):
        for item in node:
            yield from _names(item, location)
    if not isinstance(node, dict):
        return
    here = node.get("query_location", location)
    location = here if isinstance(here, int) and here < 2**63 else location
    kind = node.get("type")
    if node.get("class") == "FUNCTION" and not node.get("is_operator"):
        yield "function", str(node["function_name"]).lower(), location
    elif node.get("class") == "WINDOW":
        yield "function", str(node.get("function_name", "")).lower(), location
    elif kind == "COLUMN_REF":
        yield "column", str(node["column_names"][-1]).lower(), location
    elif kind == "STAR":
        yield "every column", "*", location
    elif kind == "BASE_TABLE":
        yield "table", str(node["table_name"]), location
    elif kind == "TABLE_FUNCTION":
        yield "table function", str(node["function"]["function_name"]).lower(), location
    if node.get("sample"):
        yield "sample", "TABLESAMPLE", location
    for value in node.values():
        yield from _names(value, location)


def _classes(node: Any) -> Iterator[str]:
    """The classes of a tree's expressions."""
    if isinstance(node, list):
        for item in node:
            yield from _classes(item)
    elif isinstance(node, dict):
        if "class" in node:
            yield str(node["class"])
        for value in node.values():
            yield from _classes(value)


def _cte_names(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _cte_names(item)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name == "cte_map":
                yield from (str(entry["key"]) for entry in value.get("map", []))
            yield from _cte_names(value)
