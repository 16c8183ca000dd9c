"""What a policy's SQL file says about itself: its typed parameters, in comments that people read too.

    -- parameter threshold: number = 0.5, from 0 to 1: least itm_prob of a kept text
    -- parameter k: whole number = 2, from 1 to 1000: texts kept for an image
    -- parameter ranked_by: text = itm_prob, one of itm_prob, itc_sim: what texts are ranked by
    -- may be null: itm_prob
    -- decides: image by image, after cuts

The last says that a verdict depends on the texts of one image alone, and on what the clause `cuts` (WITH cuts AS ...)
found in all texts; such a policy runs over a few shards at a time. A line of the header is on a line of its own; whatever else the comments say is for people alone.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import ConfigError

Value = float | int | str

TYPES = ("number", "whole number", "text")

_PARAMETER = re.compile(r"^\s*--\s*parameter\b(?P<rest>.*)$")
_DECLARED = re.compile(
    r"^\s+(?P<name>[a-z_][a-z0-9_]*)\s*:\s*(?P<type>number|whole number|text)\s*=\s*(?P<default>[^,:]+?)\s*"
    r"(?:,\s*from\s+(?P<low>[^\s,:]+)\s+to\s+(?P<high>[^\s,:]+)\s*|,\s*one of\s+(?P<choices>[^:]+?)\s*)?"
    r":\s*(?P<meaning>\S.*)$"
)
_MAY_BE_NULL = re.compile(r"^\s*--\s*may be null:\s*(?P<names>.+)$")
_DECIDES = re.compile(r"^\s*--\s*decides:\s*(?P<how>.+?)\s*$")
_BY_IMAGE = ("image by image", "image by image, after cuts")
_SHAPE = "-- parameter NAME: number = 0.5, from 0 to 1: what it means"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One `$name` of a policy's SQL."""

    name: str
    type: str
    """number, whole number or text."""
    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    """The words that a text may be; any when empty."""
    meaning: str
    line: int
    """Line of the file that declares it, from 1."""

    def checked(self, value: Any) -> Value:
        """`value` as the parameter's type; ValueError saying what is allowed."""
        if self.type == "text":
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                raise ValueError(f"{value!r} is not {self.allowed}")
            return value
        number = _number(value)
        if number is None or (self.type == "whole number" and number != int(number)):
            raise ValueError(f"{value!r} is not {self.allowed}")
        below = self.low is not None and number < self.low
        if below or (self.high is not None and number > self.high):
            raise ValueError(f"{value!r} is not {self.allowed}")
        return int(number) if self.type == "whole number" else number

    @property
    def allowed(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        between = "" if self.low is None else f" from {self.low:g} to {self.high:g}"
        return f"a {self.type}{between}"

    def __str__(self) -> str:
        return f"{self.name}: {self.allowed}, {self.default!r} when not given: {self.meaning}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The declarations of one policy."""

    parameters: tuple[Parameter, ...] = ()
    may_be_null: frozenset[str] = frozenset()
    """Numbers that the policy can do without, though its SQL reads them."""
    by_image: bool = False
    """Whether a verdict depends on the texts of one image alone, cuts apart."""
    has_cuts: bool = False
    """Whether its WITH clause `cuts` is worked out from all texts first."""


def read_header(sql: str, name: str) -> Header:
    """The declarations in a policy's comments; ConfigError quotes the line that is not as it should be."""
    parameters: dict[str, Parameter] = {}
    may_be_null: set[str] = set()
    how = ""
    for number, line in enumerate(sql.splitlines(), start=1):
        if found := _MAY_BE_NULL.match(line):
            may_be_null.update(word.strip() for word in found["names"].split(","))
        elif found := _DECIDES.match(line):
            how = found["how"]
            if how not in _BY_IMAGE:
                raise ConfigError(
                    f"policy {name}, {quoted_line(sql, number)}: a policy decides {' or '.join(_BY_IMAGE)}; "
                    "without this line it is run on all texts at once"
                )
        elif found := _PARAMETER.match(line):
            try:
                parameter = _declared(found["rest"], number)
                if parameter.name in parameters:
                    raise ValueError(
                        f"{parameter.name} stands on line {parameters[parameter.name].line} too"
                    )
            except ValueError as err:
                raise ConfigError(f"policy {name}, {quoted_line(sql, number)}: {err}") from err
            parameters[parameter.name] = parameter
    return Header(
        parameters=tuple(parameters.values()),
        may_be_null=frozenset(may_be_null),
        by_image=how in _BY_IMAGE,
        has_cuts=how == _BY_IMAGE[1],
    )


def filled(header: Header, name: str, given: Mapping[str, Any]) -> dict[str, Value]:
    """Every parameter's value: the given one or its default. ConfigError for one that does not fit."""
    known = {parameter.name: parameter for parameter in header.parameters}
    for unknown in sorted(set(given) - set(known)):
        there_are = "; ".join(map(str, header.parameters)) or "none"
        raise ConfigError(
            f"policy {name} has no parameter {unknown!r}; its parameters: {there_are}"
        )
    values = {}
    for parameter in header.parameters:
        value = given.get(parameter.name, parameter.default)
        try:
            values[parameter.name] = parameter.checked(value)
        except ValueError as err:
            raise ConfigError(
                f"policy {name}, parameter {parameter.name}: {err} ({parameter.meaning})"
            ) from err
    return values


def quoted_line(sql: str, number: int) -> str:
    """A line of a file, as errors quote it."""
    lines = sql.splitlines()
    text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return f"line {number}, `{text}`"


def _declared(rest: str, line: int) -> Parameter:
    found = _DECLARED.match(rest)
    if found is None:
        raise ValueError(
            f"not a parameter as a header has it: {_SHAPE}; types are {', '.join(TYPES)}, and a text "
            "may say `one of A, B` where a number says its range"
        )
    choices = tuple(word.strip() for word in (found["choices"] or "").split(",") if word.strip())
    if found["type"] != "text" and choices:
        raise ValueError("`one of` is for a text; a number has `from A to B`")
    if found["type"] == "text" and found["low"] is not None:
        raise ValueError("`from A to B` is for a number; a text has `one of A, B`")
    ends = [None if found[end] is None else _number(found[end]) for end in ("low", "high")]
    if found["low"] is not None and (None in ends or ends[0] > ends[1]):  # type: ignore[operator]
        raise ValueError(f"from {found['low']} to {found['high']} is no range of numbers")
    default: Any = found["default"]
    if found["type"] != "text" and (default := _number(default)) is None:
        raise ValueError(f"its default {found['default']} is no number")
    parameter = Parameter(
        name=found["name"],
        type=found["type"],
        default=default,
        low=ends[0],
        high=ends[1],
        choices=choices,
        meaning=found["meaning"].strip(),
        line=line,
    )
    checked = Parameter.checked(parameter, default)
    return Parameter(
        **{name: getattr(parameter, name) for name in parameter.__slots__} | {"default": checked}
    )


def _number(value: Any) -> float | None:
    """A finite number, or text that is one; None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
