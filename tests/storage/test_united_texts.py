"""One image under many texts: what a repeated address or a copy says becomes a caption of the image that is stored."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from web_world import PictureServer, download_config, jpeg, write_list

from storage import (
    Lake,
    UrlListConfig,
    candidates,
    decide,
    ids,
    ingest_urls,
    list_parts,
    part_manifest,
    query,
    read_part,
)
from storage.fingerprint import basis_of
from storage.purge import Request, asked_image, purge
from storage.tables import PartRef, commit_part, drop_part, rows_table
from storage.why import why

ROWS = [
    ("ok50.jpg", "a cat"),
    ("ok51.jpg", "a dog"),
    ("ok50.jpg", "the cat of a neighbour"),
    # The next shard.
    ("ok50.jpg?copy", "un chat"),
    ("ok50.jpg", "a cat"),
    ("ok52.jpg", ""),
    # The next shard.
    ("ok52.jpg", "a late text"),
    ("ok50.jpg?other", "one too many"),
    ("gone.jpg", "a dead link"),
    # The next shard.
    ("gone.jpg", "another text of a dead link"),
    ("ok51.jpg", "DSC_0042.JPG"),
    ("ok53.jpg", "a bird"),
]


def _ingested(
    folder: Path,
    pictures: PictureServer,
    rows: list[tuple[str, str]],
    *,
    round: int = 1,
    lake: Lake | None = None,
    **changes: Any,
) -> tuple[Lake, list[PartRef]]:
    lake = lake or Lake.open(str(folder / "lake"), create=True)
    path = write_list(folder / f"urls-{round}.parquet", rows, host="united.test")
    given = {"texts_per_image": 3, "text_rules": ("file_name",), "shard_rows": 3} | changes
    parts = ingest_urls(
        lake, UrlListConfig(path=str(path)), download_config(pictures, **given), round=round
    )
    return lake, parts


def _texts(lake: Lake, number: int, status: str = "ok") -> list[str]:
    rows = query(
        lake,
        "SELECT caption FROM captions WHERE image_id = $id AND status = $status ORDER BY caption",
        {"id": ids.image_id(jpeg(number)), "status": status},
    )
    return [row["caption"] for row in rows.to_pylist()]


def test_texts_of_an_address_and_of_copies_are_captions_of_the_image(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake, parts = _ingested(tmp_path, pictures, ROWS)
    assert _texts(lake, 50) == ["a cat", "the cat of a neighbour", "un chat"]
    assert _texts(lake, 50, "repeated") == ["a cat"]
    assert _texts(lake, 50, "too_many_texts") == ["one too many"]
    assert (_texts(lake, 51), _texts(lake, 51, "file_name")) == (["a dog"], ["DSC_0042.JPG"])
    assert _texts(lake, 52) == ["a late text"], "its first row had none"
    assert not query(lake, "FROM captions WHERE caption LIKE '%dead link'").num_rows
    unique = query(
        lake,
        "SELECT count(*) AS n, count(DISTINCT caption_id) AS d FROM captions WHERE status = 'ok'",
    )
    assert unique.to_pylist() == [{"n": 6, "d": 6}]
    # Each text stands in the part of its own row; its row says where the image lies.
    rows = query(
        lake,
        'SELECT p.key, p.shard, p."offset", p.size, o.shard AS home, o."offset" AS "start", o.size AS num FROM pairs p '
        "JOIN pairs o ON o.image_id = p.image_id AND o.status = 'ok' WHERE p.status <> 'ok'",
    ).to_pylist()
    assert len(rows) == 6
    assert all(
        (r["shard"], r["offset"], r["size"]) == (r["home"], r["start"], r["num"]) for r in rows
    )
    counts = [part_manifest(lake, ref) for ref in parts if ref.table == "captions"]
    assert [(m.num_in, m.num_ok, m.reasons) for m in counts] == [
        (3, 3, {}),
        (3, 1, {"no_text": 1, "repeated": 1}),
        (2, 1, {"too_many_texts": 1}),
        (2, 1, {"file_name": 1}),
    ]
    lines = query(lake, "SELECT outcome, rows FROM funnel WHERE stage = 'texts'").to_pylist()
    assert {row["outcome"]: row["rows"] for row in lines} == {
        "web": 6,
        "web, file_name": 1,
        "web, repeated": 1,
        "web, too_many_texts": 1,
    }
    assert Counter(row["image_id"] for row in query(lake, "FROM raw").to_pylist())[
        ids.image_id(jpeg(50))
    ] == 3  # fmt: skip


def test_a_later_list_adds_texts_to_images_of_an_earlier_one(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake, first = _ingested(tmp_path, pictures, ROWS[:3], texts_per_image=4)
    before = {ref.path: part_manifest(lake, ref).sha256 for ref in first}
    more = [
        ("ok50.jpg", "eine Katze"),
        ("ok50.jpg?new", "the cat of a neighbour"),
        ("ok50.jpg?newer", "gata"),
        ("ok50.jpg", "one too many"),
        ("ok54.jpg", "a horse"),
    ]
    _ingested(tmp_path, pictures, more, round=2, lake=lake, texts_per_image=4)
    assert _texts(lake, 50) == ["a cat", "eine Katze", "gata", "the cat of a neighbour"]
    assert _texts(lake, 50, "repeated") == ["the cat of a neighbour"]
    assert _texts(lake, 50, "too_many_texts") == ["one too many"]
    assert {ref.path: part_manifest(lake, ref).sha256 for ref in first} == before
    later = query(
        lake, "SELECT b.round, caption FROM brought_later b JOIN captions USING (caption_id)"
    )
    assert sorted((row["round"], row["caption"]) for row in later.to_pylist()) == [
        (2, "a horse"),
        (2, "eine Katze"),
        (2, "gata"),
        # By its id: the same words again have that of the first.
    ]
    # A list of nothing but texts is no failure, and a third round knows what the second brought.
    _ingested(
        tmp_path, pictures, [("ok50.jpg?3", "gata"), ("ok54.jpg", "cavallo")], round=3, lake=lake
    )
    assert _texts(lake, 54) == ["a horse", "cavallo"]
    assert _texts(lake, 50, "repeated") == ["gata", "the cat of a neighbour"]


def test_one_text_an_image_is_what_was_done_before(tmp_path: Path, pictures: PictureServer) -> None:
    lake, parts = _ingested(tmp_path, pictures, ROWS, texts_per_image=1)
    assert _texts(lake, 50) == ["a cat"]
    assert query(lake, "FROM captions").num_rows == 3
    assert not query(lake, "FROM pairs WHERE shard IS NOT NULL AND status <> 'ok'").num_rows
    assert "texts_per_image" not in part_manifest(lake, parts[0]).basis["config"]


def test_a_shard_that_is_made_again_has_the_same_texts(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake, parts = _ingested(tmp_path, pictures, ROWS)
    sums = {ref.path: part_manifest(lake, ref).sha256 for ref in parts if ref.table == "captions"}
    for ref in parts:
        if ref.name.endswith("00002"):
            drop_part(lake, ref)
    _ingested(tmp_path, pictures, ROWS, lake=lake)
    assert {path: part_manifest(lake, ref).sha256 for path, ref in _captions(lake)} == sums


def _captions(lake: Lake) -> list[tuple[str, PartRef]]:
    return [(ref.path, ref) for ref in list_parts(lake, "captions", 0)]


def _score(lake: Lake) -> None:
    """A score of each web text, made of its id, in a part that has the shard's name."""
    for _, ref in _captions(lake):
        rows = [
            {name: row[name] for name in ("caption_id", "image_id")}
            | {"model_id": "f" * 32, "status": "ok", "round": 1}
            | {"itm_prob": int(row["caption_id"][:4], 16) / 65536, "itc_sim": 0.5}
            for row in read_part(lake, ref).to_pylist()
            if row["status"] == "ok"
        ]
        basis = basis_of("score", 1, {"name": ref.name}, [])
        commit_part(lake, "scores", ref.name, rows_table("scores", rows), round=1, basis=basis)


@pytest.mark.parametrize(
    "policy", ["best_of", "blip", "percentile_by_source_name", "raw_else_synthetic"]
)
def test_a_policy_sees_all_texts_of_an_image_together(
    tmp_path: Path, pictures: PictureServer, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    rows = [(f"ok{60 + i % 5}.jpg?v={i // 10}", f"text {i}") for i in range(30)]
    lake, _ = _ingested(tmp_path, pictures, rows)
    _score(lake)
    source = Path(candidates.__file__).parent / "policies" / f"{policy}.sql"
    whole = tmp_path / "whole.sql"
    whole.write_text(source.read_text().replace("-- decides: image by image", "-- "))
    at_once = read_part(lake, decide(lake, 1, str(whole))).to_pylist()
    monkeypatch.setattr(candidates, "CHUNK_TEXTS", 1)
    chunked = read_part(lake, decide(lake, 1, policy)).to_pylist()
    assert len(chunked) == 15, "three texts of each of five images"
    fates = [
        {row["caption_id"]: (row["image_id"], row["kept"], row["reason"]) for row in rows}
        for rows in (at_once, chunked)
    ]
    assert fates[0] == fates[1]
    if policy == "best_of":
        kept = Counter(row["image_id"] for row in chunked if row["kept"])
        assert set(kept.values()) == {1}
        assert len(kept) == 5
    assert not any("not scored" in row["reason"] for row in chunked)
    verdicts = query(lake, f"FROM verdicts_of(1, '{list_parts(lake, 'decisions', 1)[0].name}')")
    assert verdicts.num_rows == 15
    assert set(verdicts.column("source_name").to_pylist()) == {"web"}


def test_why_tells_every_text_of_an_image_wherever_it_stands(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake, _ = _ingested(tmp_path, pictures, ROWS)
    _score(lake)
    found = why(lake, ids.image_id(jpeg(50)))
    texts = {text["caption"]: text for text in found["images"][0]["texts"]}
    assert set(texts) == {"a cat", "the cat of a neighbour", "un chat", "one too many"}
    assert len(texts["un chat"]["scores"]) == 1
    again = why(lake, "http://united.test/ok50.jpg?copy")["images"][0]["texts"]
    assert again == found["images"][0]["texts"]


def test_a_purge_takes_the_texts_of_every_row_of_an_image(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake, _ = _ingested(tmp_path, pictures, ROWS)
    _score(lake)
    decide(lake, 1, "best_of")
    image_id = ids.image_id(jpeg(50))
    done = purge(lake, Request(asked=(asked_image(image_id),), because="asked by mail"))
    assert done.proof.is_clean
    assert done.plan is not None
    assert (done.plan.num_images, done.plan.shards) == (1, {"web-0001-00-00000": 1})
    assert done.plan.num_bytes == len(jpeg(50))
    assert done.plan.num_rows == 5
    assert _texts(lake, 50) == []
    urls = {row["url"].rpartition("/")[2] for row in done.rows.to_pylist()}
    assert urls == {"ok50.jpg", "ok50.jpg?copy", "ok50.jpg?other"}
    assert [row["shard"] for row in done.rows.to_pylist() if row["shard"]] == ["web-0001-00-00000"]
    assert not query(lake, "FROM scores WHERE image_id = $id", {"id": image_id}).num_rows
    assert _texts(lake, 52) == ["a late text"]
    # Found, not made again; and a later list brings no text of it.
    _ingested(tmp_path, pictures, ROWS, lake=lake)
    late = [("ok50.jpg?late", f"late {n}") for n in range(5)]
    rows = [late[0], ("ok55.jpg", "b"), *late[1:]]
    _ingested(tmp_path, pictures, rows, round=2, lake=lake)
    assert _texts(lake, 50) == []
    found = query(lake, "SELECT status, alt_text FROM pairs WHERE url LIKE '%late'").to_pylist()
    assert found == [{"status": "purged", "alt_text": None}] * 5
