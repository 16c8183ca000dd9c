"""Captions of another decoding beside a round: decided on by every kind of policy, and shown by one view alone."""

import pytest
from rounds_of_rows import BASIS, caption, image, scored, write_world

from storage.candidates import candidates_of
from storage.catalog import VIEWS, connect, query
from storage.errors import ConfigError, EmptyInput, StaleOutput
from storage.generations import active_generation
from storage.lake import Lake
from storage.policy import decide, decide_variant
from storage.tables import commit_part, list_parts, part_manifest, read_part, rows_table

# b0 is the round's own s0 word for word (one id); s1 of the round has no number, its like here has one.
PROBS = {"s0": 0.3, "b1": 0.95, "b2": 0.99, "b3": None}


def write_variant(lake: Lake, variant: str = "beam", probs: dict = PROBS) -> None:
    write_world(lake)
    texts = [caption(name, int(name[1]), "synthetic", 1) for name in probs]
    texts.append(caption("b-failed", 0, "synthetic", 1, status="empty"))
    scores = [scored(name, int(name[1]), prob) for name, prob in probs.items()]
    for table, rows in (("variant_captions", texts), ("variant_scores", scores)):
        rows = [row | {"variant": variant} for row in rows]
        commit_part(lake, table, f"{variant}-p", rows_table(table, rows), round=1, basis=BASIS)


def test_candidates_of_a_variant_are_the_web_texts_and_its_captions_with_their_own_scores(
    lake: Lake,
) -> None:
    write_variant(lake)
    columns = {"caption_id", "image_id", "source", "itm_prob", "score_error", "source_name"}
    with connect(lake) as con:
        rows = con.execute(candidates_of(lake, 1, "beam").sql(columns)).fetchall()
        own = con.execute(candidates_of(lake, 1).sql({"caption_id", "itm_prob"})).fetchall()
    found = {row[0]: row[3] for row in rows}
    assert len(found) == len(rows)
    assert found == {"w0": 0.9, "w1": 0.1, "w2": 0.8, "w3": 0.5} | PROBS
    assert {row[0]: row[4] for row in rows}["b3"] == "cannot decode"
    assert {row[5] for row in rows} == {"shop", "blog"}
    assert ("s0", 0.7) in own
    assert len(own) == 8


@pytest.mark.parametrize(
    ("policy", "params", "kept"),
    [
        ("blip", {}, {"w0", "w2", "w3", "b1", "b2"}),
        ("percentile", {"share": 0.5}, {"w0", "w2", "b1", "b2"}),
        ("best_of", {}, {"w0", "b1", "b2", "w3"}),
        ("raw", {}, {"w0", "w1", "w2", "w3"}),
    ],
)
def test_decide_variant_gives_every_text_one_row_and_counts_nowhere(
    local_lake: Lake, policy: str, params: dict, kept: set[str]
) -> None:
    lake = local_lake
    write_variant(lake)
    decide(lake, 1)
    active = active_generation(lake, 1)
    before = _views(lake)
    ref = decide_variant(lake, 1, "beam", policy, params)
    rows = {row["caption_id"]: row for row in read_part(lake, ref).to_pylist()}
    assert set(rows) == {"w0", "w1", "w2", "w3", *PROBS}
    assert {name for name, row in rows.items() if row["kept"]} == kept
    assert {row["variant"] for row in rows.values()} == {"beam"}
    assert {row["generation"] for row in rows.values()} == {ref.name}
    assert ref.name.startswith(f"{policy}-")
    assert ref.name.endswith("-beam")
    assert part_manifest(lake, ref).num_ok == len(kept)
    assert active_generation(lake, 1) == active
    assert _views(lake) == before
    assert decide_variant(lake, 1, "beam", policy, params) == ref
    shown = query(
        lake,
        f"SELECT caption_id, caption, kept FROM variant_verdicts WHERE generation = '{ref.name}'",
    ).to_pylist()
    held_out = {name for name, row in rows.items() if row["image_id"] == image(2)}
    assert {row["caption_id"] for row in shown} == set(rows) - held_out
    assert {row["caption_id"] for row in shown if row["kept"]} == kept - held_out
    assert all(row["caption"] == f"text {row['caption_id']}" for row in shown)


def test_variants_lie_side_by_side_and_new_scores_make_decisions_stale(lake: Lake) -> None:
    write_variant(lake)
    write_variant(lake, "greedy", {"g0": 0.9})
    beam, greedy = (decide_variant(lake, 1, variant) for variant in ("beam", "greedy"))
    assert _kept(lake, "greedy") == {"w0", "w2", "w3", "g0"}
    assert [ref.name for ref in list_parts(lake, "variant_decisions", 1)] == [
        beam.name,
        greedy.name,
    ]
    assert set(read_part(lake, greedy).column("caption_id").to_pylist()) == {
        "w0",
        "w1",
        "w2",
        "w3",
        "g0",
    }
    other = rows_table("variant_scores", [scored("g0", 0, 0.2) | {"variant": "greedy"}])
    basis = BASIS | {"version": 2}
    commit_part(lake, "variant_scores", "greedy-p", other, round=1, basis=basis)
    with pytest.raises(StaleOutput, match="variant_decisions"):
        decide_variant(lake, 1, "greedy")
    assert decide_variant(lake, 1, "beam") == beam
    decide_variant(lake, 1, "greedy", on_stale="rebuild")
    assert _kept(lake, "greedy") == {"w0", "w2", "w3"}


def test_decide_variant_refuses_what_only_the_round_has(lake: Lake) -> None:
    write_variant(lake)
    with pytest.raises(ConfigError, match="none of decoding beam: rank by itm_prob or itc_sim"):
        decide_variant(lake, 1, "beam", "top_k", {"ranked_by": "judge_itc_sim"})
    with pytest.raises(EmptyInput):
        decide_variant(Lake.open(f"{lake.uri}-empty", create=True), 1, "beam")


def _kept(lake: Lake, variant: str) -> set[str]:
    (ref,) = (ref for ref in list_parts(lake, "variant_decisions", 1) if ref.name.endswith(variant))
    return {row["caption_id"] for row in read_part(lake, ref).to_pylist() if row["kept"]}


def _views(lake: Lake) -> dict[str, list[str]]:
    """The rows of every view that should not notice."""
    views = [view for view in [*VIEWS, "decisions"] if view != "variant_verdicts"]
    with connect(lake) as con:
        return {view: sorted(map(str, con.execute(f"FROM {view}").fetchall())) for view in views}
