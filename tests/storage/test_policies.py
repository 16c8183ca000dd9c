"""The policies that come with the program, against what they mean worked out in Python."""

import math
import random
from collections import defaultdict
from pathlib import Path

import duckdb
import pytest
from rounds_of_rows import BASIS, caption, pair, scored

from storage.errors import ConfigError
from storage.lake import Lake
from storage.policy import decide
from storage.policy_file import built_in_policies, read_policy
from storage.policy_run import columns_of
from storage.policy_sql import parse
from storage.tables import commit_part, drop_part, list_parts, part_manifest, read_part, rows_table

SHARDS = ("web-0001-00-00000", "web-0001-00-00001", "web-0001-00-00002")
IMAGES = 90


@pytest.fixture
def many(local_lake: Lake) -> Lake:
    """Three shards of thirty images, up to three synthetic texts each; two decimals make ties, some have no score."""
    rng = random.Random(3)
    for number, name in enumerate(SHARDS):
        first = 30 * number
        sources = ("shop", "blog", "museum")
        pairs = [
            pair(i, source_name=sources[i % 3]) | {"shard": name} for i in range(first, first + 30)
        ]
        web = [caption(f"w{i}", i, "web", 0) for i in range(first, first + 30)]
        made = [
            caption(f"s{i}.{n}", i, "synthetic", 1)
            for i in range(first, first + 30)
            for n in range(rng.choice((0, 1, 3)))
        ]
        scores = []
        for text in [*web, *made]:
            number_of = int(text["caption_id"][1:].split(".")[0])
            prob = None if rng.random() < 0.1 else rng.randrange(0, 101, 5) / 100
            sim = None if prob is None else rng.randrange(-20, 60, 5) / 100
            scores.append(scored(text["caption_id"], number_of, prob) | {"itc_sim": sim})
        for table, round, rows in (
            ("pairs", None, pairs),
            ("captions", 0, web),
            ("captions", 1, made),
            ("scores", 1, scores),
        ):
            commit_part(local_lake, table, name, rows_table(table, rows), round=round, basis=BASIS)
    return local_lake


def _texts(lake: Lake, ranked_by: str = "itm_prob") -> list[dict]:
    """Every text with its number, from the tables themselves."""
    found = []
    for name in SHARDS:
        scores = {}
        for row in _rows(lake, "scores", name, 1):
            scores[row["caption_id"]] = row[ranked_by]
        for round in (0, 1):
            for row in _rows(lake, "captions", name, round):
                number = scores.get(row["caption_id"])
                found.append(
                    {k: row[k] for k in ("caption_id", "image_id", "source")} | {"x": number}
                )
    return found


def _rows(lake: Lake, table: str, name: str, round: int) -> list[dict]:
    (ref,) = (part for part in list_parts(lake, table, round) if part.name == name)
    return read_part(lake, ref).to_pylist()


def _kept(lake: Lake, policy: str, **params: object) -> set[str]:
    ref = decide(lake, 1, policy, params, activate=False)
    rows = read_part(lake, ref).to_pylist()
    assert len(rows) == len({row["caption_id"] for row in rows})
    assert {row["caption_id"] for row in rows} == {text["caption_id"] for text in _texts(lake)}
    assert all(row["reason"] for row in rows)
    return {row["caption_id"] for row in rows if row["kept"]}


def _cut(numbers: list[float], share: float) -> float:
    """The number that is last within the share; nothing reaches the cut of no share."""
    wanted = math.ceil(round(share * len(numbers), 9))
    return sorted(numbers, reverse=True)[wanted - 1] if wanted else math.inf


@pytest.mark.parametrize("share", [0, 0.1, 0.37, 0.5, 1 / 3, 0.99, 1.0])
@pytest.mark.parametrize("ranked_by", ["itm_prob", "itc_sim"])
def test_percentile_keeps_its_share_of_each_source_and_all_ties(
    many: Lake, share: float, ranked_by: str
) -> None:
    kept = _kept(many, "percentile", share=share, ranked_by=ranked_by)
    expected = set()
    for source in ("web", "synthetic"):
        texts = [t for t in _texts(many, ranked_by) if t["source"] == source and t["x"] is not None]
        cut = _cut([t["x"] for t in texts], share)
        expected |= {t["caption_id"] for t in texts if t["x"] >= cut}
    assert kept == expected
    if share == 1.0:
        assert kept == {t["caption_id"] for t in _texts(many) if t["x"] is not None}


def test_percentile_by_source_name_cuts_each_site_by_itself(many: Lake) -> None:
    kept = _kept(many, "percentile_by_source_name", share=0.3)
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for text in _texts(many):
        if text["x"] is not None:
            groups[text["source"], int(text["image_id"], 16) % 3].append(text)
    expected = set()
    for texts in groups.values():
        cut = _cut([t["x"] for t in texts], 0.3)
        expected |= {t["caption_id"] for t in texts if t["x"] >= cut}
    assert len(groups) == 6
    assert kept == expected


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_ranks_web_and_synthetic_texts_of_an_image_together(many: Lake, k: int) -> None:
    by_image: dict[str, list[dict]] = defaultdict(list)
    for text in _texts(many):
        if text["x"] is not None:
            by_image[text["image_id"]].append(text)
    expected = set()
    for texts in by_image.values():
        texts.sort(key=lambda t: (-t["x"], t["source"] != "web", t["caption_id"]))
        expected |= {t["caption_id"] for t in texts[:k]}
    assert _kept(many, "top_k", k=k) == expected
    if k == 1:
        assert _kept(many, "best_of") == expected
        least = {t["caption_id"] for t in _texts(many) if (t["x"] or 0) >= 0.6}
        assert _kept(many, "best_of", least=0.6) == expected & least


@pytest.mark.parametrize("share", [0, 0.3, 1.0])
def test_raw_else_synthetic_takes_a_synthetic_text_where_the_web_text_falls_below(
    many: Lake, share: float
) -> None:
    texts = _texts(many)
    cut = _cut([t["x"] for t in texts if t["source"] == "web" and t["x"] is not None], share)
    stays = {
        t["image_id"]
        for t in texts
        if t["source"] == "web" and t["x"] is not None and t["x"] >= cut
    }
    expected = {
        t["caption_id"]
        for t in texts
        if t["x"] is not None
        and t["x"] >= cut
        and (t["source"] == "web" or t["image_id"] not in stays)
    }
    assert _kept(many, "raw_else_synthetic", share=share) == expected


def test_the_four_arms_of_table_1_are_filter_and_captioner_with_and_without_each_other(
    many: Lake,
) -> None:
    texts = _texts(many)
    web = {t["caption_id"] for t in texts if t["source"] == "web"}
    good = {t["caption_id"] for t in texts if (t["x"] or 0) >= 0.5}
    everything = {t["caption_id"] for t in texts}
    assert _kept(many, "raw") == web
    assert _kept(many, "synthetic") == everything - web
    assert _kept(many, "all") == everything
    assert _kept(many, "web_filtered") == web & good
    assert _kept(many, "blip") == good


@pytest.mark.parametrize("policy", built_in_policies())
def test_every_policy_gives_the_same_bytes_again_in_chunks_of_any_worker(
    many: Lake, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.candidates.CHUNK_TEXTS", 40)  # each shard by itself
    ref = decide(many, 1, policy, activate=False)
    first = part_manifest(many, ref)
    assert first.num_in == len(_texts(many)) == first.num_ok + first.num_not_ok
    drop_part(many, ref)
    monkeypatch.setattr("storage.policy_run.MAX_WORKERS", 1)
    again = part_manifest(many, decide(many, 1, policy, activate=False))
    assert again.sha256 == first.sha256


def test_every_policy_is_documented_and_says_how_it_decides() -> None:
    for name in built_in_policies():
        policy = read_policy(name)
        assert policy.sql.startswith("-- "), name
        assert policy.header.by_image, name
        assert all(parameter.meaning for parameter in policy.header.parameters)


@pytest.mark.parametrize(
    ("policy", "params", "said"),
    [
        ("blip", {"threshold": 1.5}, r"parameter threshold: 1\.5 is not a number from 0 to 1 \(least itm_prob"),
        ("blip", {"threshold": "high"}, "'high' is not a number from 0 to 1"),
        ("blip", {"threshold": float("nan")}, "nan is not a number"),
        ("blip", {"threshold": True}, "True is not a number"),
        ("top_k", {"k": 1.5}, "1.5 is not a whole number from 1 to 1000"),
        ("top_k", {"ranked_by": "luck"}, "'luck' is not one of itm_prob, itc_sim, judge_itm_prob"),
        ("top_k", {"threshold": 0.5}, "no parameter 'threshold'; its parameters: k: a whole number from 1 to 1000"),
        ("raw", {"threshold": 0.5}, "no parameter 'threshold'; its parameters: none"),
    ],
)  # fmt: skip
def test_decide_refuses_a_parameter_that_does_not_fit(
    many: Lake, policy: str, params: dict, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        decide(many, 1, policy, params)


def test_policy_of_a_user_that_does_not_say_how_it_decides_sees_all_texts_at_once(
    many: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.candidates.CHUNK_TEXTS", 40)
    mine = tmp_path / "mine.sql"
    mine.write_text(
        "-- parameter most: whole number = 10, from 0 to 100: texts kept in all\n"
        "SELECT caption_id, coalesce(row_number() OVER (ORDER BY itm_prob DESC NULLS LAST, caption_id) <= $most, "
        "false) AS kept, 'by rank' AS reason FROM candidates"
    )
    assert len(_kept(many, str(mine), most=7)) == 7
    texts = sorted(
        _texts(many), key=lambda t: (-(t["x"] if t["x"] is not None else -1), t["caption_id"])
    )
    assert _kept(many, str(mine)) == {t["caption_id"] for t in texts[:10]}


def test_top_k_ranks_by_what_the_judge_said_of_its_sample(many: Lake) -> None:
    with pytest.raises(
        ConfigError, match="ranks by judge_itc_sim, and the judge has said none of round 1"
    ):
        decide(many, 1, "top_k", {"ranked_by": "judge_itc_sim"})
    rng = random.Random(5)
    said = {t["caption_id"]: rng.random() for t in _texts(many) if int(t["image_id"], 16) % 2 == 0}
    rows = [
        {k: t[k] for k in ("caption_id", "image_id", "source")}
        | {"model_id": "judge", "itc_sim": said[t["caption_id"]], "round": 1}
        for t in _texts(many)
        if t["caption_id"] in said
    ]
    commit_part(many, "judgements", "j", rows_table("judgements", rows), round=1, basis=BASIS)
    best: dict[str, str] = {}
    for text in sorted(_texts(many), key=lambda t: -said.get(t["caption_id"], 0)):
        if text["caption_id"] in said:
            best.setdefault(text["image_id"], text["caption_id"])
    assert _kept(many, "top_k", k=1, ranked_by="judge_itc_sim") == set(best.values())


def test_policies_read_no_column_that_they_do_not_need() -> None:
    """`*` would make the program join pairs and judgements for nothing."""
    with duckdb.connect() as con:
        for name in built_in_policies():
            columns = columns_of(parse(con, read_policy(name)))
            assert "caption" not in columns, name
            assert ("source_name" in columns) == (name == "percentile_by_source_name")
