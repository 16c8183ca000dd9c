"""What was read while a purge replaced a part is read again; any other error is told at once."""

from pathlib import Path

import duckdb
import pytest
from rounds_of_rows import write_world

from storage import layout, query
from storage.errors import QueryRefused
from storage.lake import Lake
from storage.steady import steadily


@pytest.fixture
def world(local_lake: Lake) -> Lake:
    write_world(local_lake)
    return local_lake


def _replace_a_part(lake: Lake) -> None:
    """As a purge leaves the manifest of a part that it has replaced."""
    path = Path(lake.uri) / layout.part_manifest("captions", "p", 0)
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))


def test_work_is_done_again_when_a_purge_has_replaced_a_part_meanwhile(world: Lake) -> None:
    world.root.write_bytes(layout.PURGE_BEGUN, b"{}")
    calls = []

    def work() -> int:
        calls.append(1)
        if len(calls) == 1:
            _replace_a_part(world)
            raise duckdb.InvalidInputException("TProtocolException: Invalid data")
        if len(calls) == 2:
            _replace_a_part(world)  # an answer that may be of both
        return len(calls)

    assert steadily(world, work) == 3


def test_purge_that_began_and_ended_meanwhile_is_noticed(world: Lake) -> None:
    calls = []

    def work() -> int:
        calls.append(1)
        if len(calls) == 1:
            world.root.write_bytes(layout.purge_record("20261126-1"), b"{}")
        return len(calls)

    assert steadily(world, work) == 2


def test_error_without_a_purge_is_raised_at_once(world: Lake) -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise duckdb.BinderException("no such column")

    with pytest.raises(duckdb.BinderException):
        steadily(world, work)
    assert len(calls) == 1
    world.root.write_bytes(layout.PURGE_BEGUN, b"{}")
    with pytest.raises(QueryRefused, match="nonsense"):
        query(world, "SELECT nonsense FROM pairs")
