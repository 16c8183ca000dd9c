"""Which parts of `pairs` a stage works on."""

from __future__ import annotations

from functools import lru_cache

from flows.session import Run
from storage import Lake, PartRef, layout, list_parts, read_part


def web_parts(run: Run) -> list[PartRef]:
    """The parts with web pairs of this round and all before it: nothing is ever left out."""
    later = layout.web_shards(run.round + 1)
    parts = [part for part in list_parts(run.lake, "pairs") if part.name < later]
    return [part for part in parts if is_web(run.lake, part)]


@lru_cache(maxsize=100_000)
def is_web(lake: Lake, part: PartRef) -> bool:
    """Whether a part of `pairs` comes from a URL list; a part has one pool only."""
    pools = read_part(lake, part, ["pool"]).column(0)
    return len(pools) > 0 and pools[0].as_py() == "web"
