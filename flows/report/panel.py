"""A chart with its heading."""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A chart with the heading above it."""

    title: str
    note: str
    svg: Markup
