from pathlib import Path

import duckdb
import numpy as np
import pytest
from rounds_of_rows import write_world

from storage.errors import ConfigError, EmptyInput
from storage.lake import Lake
from storage.policy import decide
from storage.policy_check import check_policy
from storage.policy_file import read_policy
from storage.sweep import sweep
from storage.tables import read_part


def _decided(lake: Lake, policy: str, params: dict) -> dict[str, int]:
    rows = read_part(lake, decide(lake, 1, policy, params, activate=False)).to_pylist()
    return {s: sum(r["kept"] for r in rows if r["source"] == s) for s in ("web", "synthetic")}


@pytest.mark.parametrize(
    ("policy", "parameter", "values"),
    [
        ("blip", "threshold", [0.0, 0.15, 0.5, 0.7, 1.0]),
        ("web_filtered", "threshold", [0.3, 0.85]),
        ("percentile", "share", [0.0, 0.3, 1.0]),
        ("top_k", "k", [1, 2]),
        ("best_of", "ranked_by", ["itm_prob", "itc_sim"]),
    ],
)
def test_sweep_counts_what_deciding_would_keep(
    lake: Lake, policy: str, parameter: str, values: list
) -> None:
    write_world(lake)
    rows = sweep(lake, 1, policy, parameter, values)
    assert [(row.value, row.source) for row in rows] == [
        (value, source) for value in values for source in ("web", "synthetic")
    ]
    assert all(row.texts == 4 for row in rows)
    for value in values:
        found = {row.source: row.kept for row in rows if row.value == value}
        assert found == _decided(lake, policy, {parameter: value})


def test_sweep_says_where_texts_lie_over_ranges(lake: Lake) -> None:
    write_world(lake)
    edges = np.array([0.2, 0.7])
    for policy, parameter, value in (("blip", "threshold", 0.5), ("percentile", "share", 0.5)):
        rows = {row.source: row for row in sweep(lake, 1, policy, parameter, [value], edges=edges)}
        texts = {source: row.ranges[0].tolist() for source, row in rows.items() if row.ranges}
        assert texts == {"web": [1, 1, 2], "synthetic": [0, 1, 1]}, (
            "an edge belongs to the range above"
        )
        web = rows["web"].ranges
        assert web is not None
        assert web[1].tolist() == ([0, 1, 2] if policy == "blip" else [0, 0, 2])


def test_policies_of_one_row_are_swept_in_one_scan() -> None:
    plain = set()
    with duckdb.connect() as con:
        for name in ("blip", "itc", "web_filtered", "percentile", "top_k", "raw_else_synthetic"):
            policy = read_policy(name)
            if check_policy(policy, policy.params({})).kept_of_a_row(con):
                plain.add(name)
    assert plain == {"blip", "itc", "web_filtered"}


def test_sweep_refuses_what_it_cannot_count(local_lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(EmptyInput, match=r"round 1 of .* has no text to sweep over"):
        sweep(local_lake, 1, "blip", "threshold", [0.5])
    write_world(local_lake)
    with pytest.raises(ConfigError, match="no parameter 'cut'; its parameters: threshold"):
        sweep(local_lake, 1, "blip", "cut", [0.5])
    with pytest.raises(ConfigError, match=r"1\.5 is not a number from 0 to 1"):
        sweep(local_lake, 1, "blip", "threshold", [0.5, 1.5])
    with pytest.raises(ConfigError, match="1 to 1000 values, not 0"):
        sweep(local_lake, 1, "blip", "threshold", [])
    with pytest.raises(ConfigError, match="'nobodys' is unknown"):
        sweep(local_lake, 1, "nobodys", "threshold", [0.5])
