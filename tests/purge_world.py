"""A small lake with a trace of every picture in every place that a purge has to clear: what purges are tested on.

Ten web pictures in two shards (some of them twice), three that people captioned, two held out, a decided round with
canaries, judge and ranks, two trained models, a page, and unfinished work.
"""

import html
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from PIL import Image

from storage import (
    Lake,
    basis_of,
    build_trainset,
    commit_part,
    decide,
    fingerprint,
    ids,
    layout,
    list_parts,
    query,
    read_part,
    registry,
)
from storage.canaries import human_images_input
from storage.intake.records import IntakeRecord, remember_intake
from storage.purge import Around
from storage.shards import Sample, write_shard
from storage.tables import Counts, rows_table

SHARDS = ("web-0001-00-00000", "web-0001-00-00001")
NUM_WEB, HUMAN, HELDOUT = 10, (40, 41, 42), (50, 4)
"""Numbers of pictures; web picture 4 is held out too."""
CANARY, OTHER_CANARY = 41, 42
BASIS = basis_of("made", 1, {}, [])


def picture(number: int) -> bytes:
    image = Image.new(
        "RGB", (24 + number, 16), (number * 20 % 256, 255 - number, number * 53 % 256)
    )
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def image_id(number: int) -> str:
    return ids.image_id(picture(number))


def url(number: int) -> str:
    """Even pictures are the museum's, odd ones of a host whose name only ends alike."""
    return f"http://{'img.museum.test' if number % 2 == 0 else 'notmuseum.test'}/{number}.png"


def alt(number: int) -> str:
    return f"alt text of picture {number}"


def synthetic(number: int) -> str:
    return f"written for picture {number}"


def human(number: int) -> list[str]:
    return [f"a person on {number:03d}", f"another person on {number:03d}"]


def write_lake(uri: str) -> Lake:
    lake = Lake.open(uri, create=True)
    parts = []
    for shard, numbers in zip(SHARDS, (range(6), range(6, NUM_WEB)), strict=True):
        parts += _write_web(lake, shard, list(numbers))
    record = IntakeRecord(basis=BASIS, parts=tuple(parts))
    remember_intake(lake, 1, "web-00", record)
    _write_people(lake, "human", list(HUMAN))
    _write_people(lake, "heldout", list(HELDOUT))
    _write_canaries(lake)
    decide(lake, 1)
    _write_models(lake)
    lake.root.write_bytes(layout.report(1), page_of(lake))
    work = lake.scratch("train", "retrain-abc")
    (work / "features.npy").write_bytes(b"numbers of every picture")
    return lake


def _write_web(lake: Lake, shard: str, numbers: list[int]) -> list[Any]:
    """Of each picture a row; of picture 1 another text, of picture 2 a copy elsewhere, and a dead address."""
    rows = [_pair(number, "web", url(number), alt(number)) for number in numbers]
    stored = rows[:]
    if 0 in numbers:
        again = _pair(1, "web", url(1), "another text of picture 1") | {"status": "duplicate_url"}
        copy = _pair(2, "web", "http://mirror.test/2.png", "a copy of picture 2")
        dead = _pair(60, "web", "HTTP://MUSEUM.test:80/dead.png", "a dead link")
        again["image_id"] = dead["image_id"] = None
        rows += [again, copy | {"status": "duplicate_image"}, dead | {"status": "http_4xx"}]
    _store(lake, shard, stored)
    texts = [_caption(n, "web", alt(n)) for n in numbers]
    written = [_caption(n, "synthetic", synthetic(n), round=1) for n in numbers]
    scores = [_score(each) for each in (*texts, *written)]
    shard_ids = [image_id(n) for n in numbers]
    caption_ids = [each["caption_id"] for each in (*texts, *written)]
    reasons = {row["status"]: 1 for row in rows if row["status"] != "ok"}
    counts = Counts(num_in=len(rows), num_ok=len(stored), reasons=reasons)
    return [
        commit_part(lake, "pairs", shard, rows_table("pairs", rows), basis=BASIS, counts=counts),
        commit_part(lake, "captions", shard, rows_table("captions", texts), round=0, basis=BASIS),
        commit_part(lake, "captions", shard, rows_table("captions", written), round=1, basis=caption_basis(shard_ids)),
        commit_part(lake, "scores", shard, rows_table("scores", scores), round=1, basis=score_basis(caption_ids)),
    ]  # fmt: skip


def caption_basis(image_ids: list[str]) -> dict[str, Any]:
    """As the captioning stage makes it: of the images."""
    return basis_of("caption", 1, {}, [fingerprint("images", 1, {"ids": image_ids}, [])])


def score_basis(caption_ids: list[str]) -> dict[str, Any]:
    return basis_of("score", 1, {}, [fingerprint("texts", 1, {"ids": sorted(caption_ids)}, [])])


def content_changes(lake: Lake, image_ids: pa.Array, hide: Any) -> Iterator[tuple[str, str, str]]:
    """What these two stages compute before and after, as the flows tell it of theirs."""
    gone = set(image_ids.to_pylist())
    for part in [*list_parts(lake, "captions", 1), *list_parts(lake, "scores", 1)]:
        rows = read_part(lake, part).to_pylist()
        left = [row for row in rows if row["image_id"] not in gone]
        if part.table == "captions":
            old, new = (caption_basis([row["image_id"] for row in each]) for each in (rows, left))
        else:
            old, new = (score_basis([row["caption_id"] for row in each]) for each in (rows, left))
        yield part.path, old["inputs"][0], new["inputs"][0]


def around() -> Around:
    return Around(content_changes=content_changes, rebuild_report=rebuild_report)


def rebuild_report(lake: Lake, round: int) -> None:
    lake.root.write_bytes(layout.report(round), page_of(lake))


def page_of(lake: Lake) -> bytes:
    """A page that shows texts and ids of the clean set."""
    rows = query(lake, "SELECT image_id, caption, url FROM clean ORDER BY ALL").to_pylist()
    items = (
        f"<li><code>{row['image_id']}</code><p>“{html.escape(row['caption'])}”</p><a href='{row['url']}'>"
        for row in rows
    )
    return f"<html><body>{''.join(items)}</body></html>".encode()


def _write_people(lake: Lake, pool: str, numbers: list[int]) -> None:
    shard = f"{pool}-people-00000"
    rows = [_pair(number, pool, f"{number}.png", None) for number in numbers]
    _store(lake, shard, rows)
    texts = [_caption(n, "human", text) for n in numbers for text in human(n)]
    commit_part(lake, "pairs", shard, rows_table("pairs", rows), basis=BASIS)
    commit_part(lake, "captions", shard, rows_table("captions", texts), round=0, basis=BASIS)


def _write_canaries(lake: Lake) -> None:
    """Both canaries with a text of their own, and with one that people gave the other."""
    drawn = sorted(image_id(number) for number in HUMAN)
    rows = [
        {"image_id": each, "is_canary": each != image_id(HUMAN[0]), "round": 1} for each in drawn
    ]
    basis = basis_of("canary-draw", 1, {}, [human_images_input(drawn)])
    commit_part(
        lake, "canary_draws", "draw", rows_table("canary_draws", rows), round=1, basis=basis
    )
    planted = [
        _canary(number, kind, text)
        for number, other in ((CANARY, OTHER_CANARY), (OTHER_CANARY, CANARY))
        for kind, text in (("true", human(number)[0]), ("random", human(other)[1]))
    ]
    commit_part(lake, "canaries", "canaries", rows_table("canaries", planted), round=1, basis=BASIS)
    judged = [
        {"caption_id": ids.caption_id(image_id(n), "web", alt(n)), "image_id": image_id(n), "source": "web"}
        | {"model_id": "e" * 32, "itm_prob": 0.5, "itc_sim": 0.5, "round": 1}
        for n in range(4)
    ]  # fmt: skip
    commit_part(
        lake, "judgements", "judgements", rows_table("judgements", judged), round=1, basis=BASIS
    )
    ranks = [
        {"round": 1, "model_id": "e" * 32, "dataset": "heldout", "direction": "i2t"}
        | {"image_id": image_id(number), "rank": 0}
        for number in HELDOUT
    ]
    commit_part(lake, "ranks", "ranks", rows_table("ranks", ranks), round=1, basis=BASIS)


def _write_models(lake: Lake) -> None:
    """One trained on all texts of the web, one finetuned from it on those of people, which has no web picture."""
    parent = None
    for name, sql in (
        ("web", "SELECT image_id, caption, source FROM raw"),
        ("people", "SELECT image_id, caption, source FROM human"),
    ):
        rows = build_trainset(lake, sql, name=name)
        folder = lake.scratch("models", name)
        (folder / registry.WEIGHTS).write_bytes(f"weights of {name}".encode())
        ref = registry.register(
            lake,
            folder,
            role="med" if parent is None else "captioner",
            round=parent is not None,
            parent_id=parent,
            trained_on=rows.fingerprint,
            config={},
        )
        parent = parent or ref.model_id
        curve = {"round": 1, "model_id": ref.model_id, "dataset": f"train-{name}", "metric": "loss"}
        basis = basis_of(f"train-{name}", 1, {}, [rows.fingerprint])
        table = rows_table("metrics", [curve | {"value": 1.0}])
        commit_part(lake, "metrics", f"train-{name}", table, round=1, basis=basis)


def _store(lake: Lake, shard: str, rows: list[dict[str, Any]]) -> None:
    samples = [
        Sample(
            key=row["key"],
            image=picture(int(row["row"])),
            ext="png",
            meta={"url": row["url"], "alt_text": row["alt_text"]},
        )
        for row in rows
    ]
    _, ranges = write_shard(lake, shard, samples)
    for row, place in zip(rows, ranges, strict=True):
        row |= {"shard": shard, "offset": place.offset, "size": place.size}


def _pair(number: int, pool: str, address: str, text: str | None) -> dict[str, Any]:
    return {
        "key": ids.pair_key(pool, address, text),
        "pool": pool,
        "row": number,
        "source_name": "shop",
        "url": address,
        "alt_text": text,
        "status": "ok",
        "attempts": 1,
        "width": 24 + number,
        "height": 16,
        "image_id": image_id(number),
        "phash": f"{number:016x}",
        "licence": "CC-BY-4.0",
        "extra": json.dumps({"title": text}),
    }


def _caption(number: int, source: str, text: str, round: int = 0) -> dict[str, Any]:
    own = image_id(number)
    about = {"caption_id": ids.caption_id(own, source, text), "image_id": own, "source": source}
    return about | {"caption": text, "status": "ok", "round": round}


def _score(caption: dict[str, Any]) -> dict[str, Any]:
    row = {name: caption[name] for name in ("caption_id", "image_id")}
    row |= {"model_id": "f" * 32, "itm_prob": 0.75, "itc_sim": 0.5}
    return row | {"status": "ok", "round": 1}


def _canary(number: int, kind: str, text: str) -> dict[str, Any]:
    own = image_id(number)
    return {
        "caption_id": ids.caption_id(own, kind, text),
        "image_id": own,
        "kind": kind,
        "truth": kind == "true",
        "stratum": "short",
        "caption": text,
        "contradicted": False,
        "model_id": "f" * 32,
        "judge_id": "e" * 32,
        "round": 1,
    }


def counts(lake: Lake) -> dict[str, int]:
    """Rows of every table."""
    tables = {part.table for part in list_parts_of_all(lake)}
    return {
        table: sum(p.num_rows for p in list_parts_of_all(lake) if p.table == table)
        for table in sorted(tables)
    }


def list_parts_of_all(lake: Lake) -> list[Any]:
    from storage.schemas import TABLES

    return [part for table in TABLES for part in list_parts(lake, table)]


def said_of(lake: Lake, needle: str) -> list[str]:
    """Where the lake says a text, read independently of the purge: columns of tables, rows of sets, bytes of files."""
    found = []
    for part in list_parts_of_all(lake):
        rows = read_part(lake, part).to_pylist()
        found += [f"{part.path}: {n}" for row in rows for n, v in row.items() if needle in str(v)]
    for rel in lake.root.list_recursive(""):
        if rel.endswith(".arrow"):
            with lake.root.open(rel) as f:
                found += [rel] * (needle in str(pa.ipc.open_file(f).read_all().to_pylist()))
        elif not rel.endswith(".parquet") and needle.encode() in lake.root.read_bytes(rel):
            found.append(rel)
    return sorted(set(found))
