from pathlib import Path

import pytest
from rounds_of_rows import BASIS, caption, image, pair, write_world

from storage import registry
from storage.catalog import query
from storage.errors import ConfigError, EmptyInput, QueryRefused, StaleOutput
from storage.generations import active_generation
from storage.lake import Lake
from storage.policy import decide
from storage.policy_file import parse_policy
from storage.tables import (
    commit_part,
    drop_part,
    list_parts,
    part_manifest,
    read_part,
    rows_table,
)


def test_decide_gives_every_text_one_row_with_a_reason(lake: Lake) -> None:
    write_world(lake)
    ref = decide(lake, 1)
    rows = {r["caption_id"]: r for r in read_part(lake, ref).to_pylist()}
    assert set(rows) == {f"{s}{i}" for s in "ws" for i in range(4)}
    assert {k for k, r in rows.items() if r["kept"]} == {"w0", "w2", "w3", "s0"}
    assert rows["w3"]["reason"] == "itm_prob >= 0.5"
    assert rows["w1"]["reason"] == "itm_prob 0.1000 < 0.5"
    assert rows["s1"]["reason"] == "not scored: cannot decode"
    assert rows["w0"]["params"] == '{"threshold":0.5}'
    manifest = part_manifest(lake, ref)
    assert (manifest.num_in, manifest.num_ok, dict(manifest.reasons)) == (8, 4, {"dropped": 4})


def test_decide_keeps_ids_and_bytes_when_made_again(local_lake: Lake) -> None:
    write_world(local_lake)
    first = part_manifest(local_lake, decide(local_lake, 1)).sha256
    assert decide(local_lake, 1, params={"threshold": 0.95}).num_rows == 8
    assert query(local_lake, "FROM clean").num_rows == 0
    ref = decide(local_lake, 1)
    assert query(local_lake, "FROM clean").num_rows == 3
    drop_part(local_lake, ref)
    assert part_manifest(local_lake, decide(local_lake, 1)).sha256 == first


def test_decide_of_a_round_leaves_out_what_a_later_one_took_in(lake: Lake) -> None:
    write_world(lake)
    first = decide(lake, 1)
    rows = read_part(lake, first)
    name = "web-0002-00-00000"
    new = pair(5) | {"shard": name}
    commit_part(lake, "pairs", name, rows_table("pairs", [new]), basis=BASIS)
    text = rows_table("captions", [caption("w5", 5, "web", 0)])
    commit_part(lake, "captions", name, text, round=0, basis=BASIS)
    assert decide(lake, 1) == first
    drop_part(lake, first)
    assert read_part(lake, decide(lake, 1)).equals(rows), "made anew, it knows what it knew then"
    of_two = read_part(lake, decide(lake, 2)).column("image_id").to_pylist()
    assert image(5) in of_two


def test_decide_under_another_threshold_is_another_generation_beside_the_first(lake: Lake) -> None:
    write_world(lake)
    first = decide(lake, 1)
    other = decide(lake, 1, params={"threshold": 0.85}, activate=False)
    assert first.name != other.name
    assert {first.name, other.name} == {p.name for p in list_parts(lake, "decisions", 1)}
    assert decide(lake, 1, params={"threshold": 0.85}, activate=False) == other
    active = active_generation(lake, 1)
    assert active is not None
    assert (active.policy, active.generation, active.of_round) == ("blip", first.name, first.name)
    counted = query(
        lake, "SELECT generation, count(*) FILTER (kept) AS n FROM decisions GROUP BY 1"
    )
    assert {row["generation"]: row["n"] for row in counted.to_pylist()} == {
        first.name: 4,
        other.name: 1,
    }
    assert query(lake, "FROM clean").num_rows == 3
    decide(lake, 1, params={"threshold": 0.85})
    assert query(lake, "SELECT caption_id, generation FROM clean").to_pylist() == [
        {"caption_id": "w0", "generation": other.name}
    ]
    now = active_generation(lake, 1)
    assert now is not None
    assert (now.generation, now.of_round) == (other.name, first.name)


def test_decide_names_what_changed_when_scores_were_made_anew(lake: Lake) -> None:
    write_world(lake)
    decide(lake, 1)
    (part,) = list_parts(lake, "scores", 1)
    rows = read_part(lake, part)
    commit_part(lake, "scores", "p", rows, round=1, basis=BASIS | {"version": 2})
    with pytest.raises(StaleOutput, match="inputs"):
        decide(lake, 1)
    assert decide(lake, 1, on_stale="rebuild").num_rows == 8


def test_decide_takes_a_policy_of_the_user_and_makes_it_count(lake: Lake, tmp_path: Path) -> None:
    write_world(lake)
    decide(lake, 1)
    mine = tmp_path / "web_only.sql"
    mine.write_text(
        "SELECT caption_id, source = 'web' AS kept, 'by source' AS reason FROM candidates;"
    )
    decide(lake, 1, str(mine), {}, activate=False)
    active = active_generation(lake, 1)
    assert active is not None
    assert active.policy == "blip"
    decide(lake, 1, str(mine), {})
    kept = query(lake, "SELECT DISTINCT source, policy FROM clean").to_pylist()
    assert kept == [{"source": "web", "policy": "web_only"}]


@pytest.mark.parametrize(
    ("sql", "error", "words"),
    [
        ("SELECT caption_id, true AS kept, 'x' AS reason FROM candidates ORDER BY caption_id LIMIT 3", ConfigError, "texts are missing"),
        ("SELECT caption_id, CAST(NULL AS BOOLEAN) AS kept, 'x' AS reason FROM candidates", ConfigError, "rows have no verdict"),
        ("SELECT caption_id, true AS kept FROM candidates", ConfigError, "no column reason"),
        ("DROP VIEW pairs", QueryRefused, "DROP"),
    ],
    ids=["forgets texts", "no verdict", "no reason", "writes"],
)  # fmt: skip
def test_decide_refuses_a_policy_that_does_not_judge_every_text(
    lake: Lake, tmp_path: Path, sql: str, error: type[Exception], words: str
) -> None:
    write_world(lake)
    (tmp_path / "bad.sql").write_text(sql)
    with pytest.raises(error, match=words):
        decide(lake, 1, str(tmp_path / "bad.sql"), {})
    assert query(lake, "FROM decisions").num_rows == 0


def test_decide_names_an_unknown_policy_or_parameter(lake: Lake) -> None:
    write_world(lake)
    with pytest.raises(ConfigError, match="'clip' is unknown; there are all, best_of, blip, itc, "):
        decide(lake, 1, "clip")
    with pytest.raises(ConfigError, match="no parameter 'treshold'"):
        decide(lake, 1, params={"threshold": 0.5, "treshold": 0.4})


def test_decide_says_what_to_run_when_there_is_no_text(lake: Lake) -> None:
    with pytest.raises(EmptyInput, match="run the ingest and caption stages"):
        decide(lake, 1)


def _without_itm_prob(lake: Lake) -> None:
    """The made-up round again, scored by a model that gives cosines alone."""
    write_world(lake)
    registry.register_foreign(
        lake, "f", role="foreign_scorer", round=1, reference="clip:some/model", config={}
    )
    (part,) = list_parts(lake, "scores", 1)
    rows = [row | {"itm_prob": None} for row in read_part(lake, part).to_pylist()]
    drop_part(lake, part)
    commit_part(lake, "scores", "p", rows_table("scores", rows), round=1, basis=BASIS)


def test_decide_refuses_a_policy_on_a_number_that_the_scorer_does_not_give(lake: Lake) -> None:
    _without_itm_prob(lake)
    with pytest.raises(ConfigError) as caught:
        decide(lake, 1)
    said = str(caught.value)
    assert said.startswith("policy blip decides by itm_prob, which model f (clip:some/model), the ")
    assert "6 texts of round 1, does not give: decide by one on itc_sim (decide.policy: itc" in said
    assert list_parts(lake, "decisions", 1) == []
    ref = decide(lake, 1, policy="itc", params={"threshold": 0.6})
    rows = {row["caption_id"]: row for row in read_part(lake, ref).to_pylist()}
    assert {name for name, row in rows.items() if row["kept"]} == {"w0", "w2", "s0"}
    assert rows["w0"]["reason"] == "itc_sim >= 0.6"
    assert rows["w1"]["reason"] == "itc_sim 0.1000 < 0.6"
    assert rows["s1"]["reason"] == "not scored: cannot decode"


def test_policy_that_says_what_may_be_null_decides_without_it(lake: Lake, tmp_path: Path) -> None:
    _without_itm_prob(lake)
    sql = "SELECT caption_id, coalesce(itm_prob, itc_sim, 0) >= $threshold AS kept, 'r' AS reason "
    path = tmp_path / "either.sql"
    header = "-- may be null: itm_prob\n-- parameter threshold: number = 0.5, from 0 to 1: least number\n"
    path.write_text(f"{header}{sql} FROM candidates")
    kept = read_part(lake, decide(lake, 1, policy=str(path))).column("kept").to_pylist()
    assert sum(kept) == 4


@pytest.mark.parametrize(
    ("sql", "numbers"),
    [
        ("SELECT itm_prob > 0.5", ("itm_prob",)),
        ("SELECT ITC_SIM, itm_prob", ("itm_prob", "itc_sim")),
        ("SELECT 'itm_prob' -- or itc_sim\n/* itm_prob\n */", ()),
        ("-- may be null: itc_sim, itm_prob\nSELECT itc_sim, itm_prob", ()),
        ("-- may be null: itm_prob\nSELECT itc_sim, itm_prob", ("itc_sim",)),
        ("SELECT my_itm_prob", ()),
    ],
)
def test_needed_numbers_are_those_that_the_sql_reads(sql: str, numbers: tuple[str, ...]) -> None:
    assert parse_policy("p", sql).needed_numbers({}) == numbers
