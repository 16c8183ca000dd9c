"""A policy as a file: its name, its SQL, what its header declares, which numbers it needs."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from storage.fingerprint import fingerprint_of
from storage.policy_header import Header, Value, filled, read_header

NUMBERS = ("itm_prob", "itc_sim")
"""What a scorer may say about a text; a model without a matching head leaves itm_prob null."""
JUDGES_NUMBERS = ("judge_itm_prob", "judge_itc_sim")
"""What the frozen judge says of the texts of its sample; null for all others."""
GENERATION_DIGITS = 10
_SENTENCE_END = re.compile(r"(?<!et al)\. ")
_OTHER_POLICY = {
    "itm_prob": "one on itc_sim (decide.policy: itc, with a decide.threshold that suits the model)",
    "itc_sim": "one on itm_prob (decide.policy: blip)",
}
_NOT_CODE = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)
_COMMENT_OR_TEXT = re.compile(r"(?P<text>'(?:[^']|'')*')|--[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One SQL file that says for every text: kept or not, and why."""

    name: str
    sql: str
    header: Header

    def params(self, given: Mapping[str, Any]) -> dict[str, Value]:
        """Every parameter's value, given or default; ConfigError for one that does not fit."""
        return filled(self.header, self.name, given)

    def generation(self, params: Mapping[str, Value], variant: str | None = None) -> str:
        """The name of the decisions made with some parameters: the policy's, and a hash of all that decides.

        Those on captions of another decoding have its name at the end.
        """
        basis = {"policy": self.name, "params": dict(params), "sql_sha256": self.sql_sha256}
        digits = fingerprint_of(basis)[:GENERATION_DIGITS]
        return "-".join([self.name, digits, *([variant] if variant else [])])

    @property
    def summary(self) -> str:
        """The first sentence of its comment."""
        lines = takewhile(lambda line: line.startswith("-- "), self.sql.splitlines())
        text = " ".join(line.removeprefix("-- ") for line in lines)
        return _SENTENCE_END.split(text, maxsplit=1)[0].rstrip(".")

    @property
    def sql_sha256(self) -> str:
        """The first 16 hex digits of the sha256 of what runs: comments may change."""
        code = _COMMENT_OR_TEXT.sub(lambda found: found["text"] or " ", self.sql)
        lines = [line.strip() for line in code.splitlines() if line.strip()]
        how = f"{self.header.by_image} {self.header.has_cuts}"
        return hashlib.sha256("\n".join([how, *lines]).encode()).hexdigest()[:16]

    def needed_numbers(self, params: Mapping[str, Value]) -> tuple[str, ...]:
        """Which of NUMBERS it cannot do without: those that its SQL reads, or that a parameter names.

        A policy that knows what to do without one says so in a comment: `-- may be null: itm_prob`.
        """
        code = _NOT_CODE.sub(" ", self.sql)
        optional = self.header.may_be_null
        return tuple(
            name
            for name in NUMBERS
            if name in params.values()
            or (name not in optional and re.search(rf"\b{name}\b", code, re.IGNORECASE))
        )


def read_policy(policy: str) -> Policy:
    """A policy, built in or at a path that ends in .sql; ConfigError when it is neither."""
    built_in = files("storage").joinpath("policies", f"{policy}.sql")
    path = Path(policy).expanduser()
    if "/" not in policy and built_in.is_file():
        return parse_policy(policy, built_in.read_text("utf-8"))
    if path.suffix == ".sql" and path.is_file():
        try:
            return parse_policy(path.stem, path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"policy {path}: not readable as UTF-8 text ({err})") from err
    raise ConfigError(
        f"policy {policy!r} is unknown; there are {', '.join(built_in_policies())}, or give the path "
        "of a .sql file"
    )


def parse_policy(name: str, sql: str) -> Policy:
    """A policy from its text; ConfigError quotes a line of the header that is not as it should be."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"policy {name!r}: its name becomes that of a file; use letters, digits, _ and - alone"
        )
    return Policy(name=name, sql=sql, header=read_header(sql, name))


def built_in_policies() -> list[str]:
    """The names of the files of `storage/policies`."""
    found = files("storage").joinpath("policies").iterdir()
    return sorted(p.name.removesuffix(".sql") for p in found if p.name.endswith(".sql"))


def explain_absent(policy: str, number: str, scorer: str) -> str:
    """Why a policy cannot decide on what a scorer gives, and what to do."""
    return (
        f"policy {policy} decides by {number}, which {scorer} does not give: decide by {_OTHER_POLICY[number]}, "
        f"or score with a model that gives {number}"
    )
