"""Pictures and texts that nobody wants, through captioning, scoring and deciding: a row each, no neighbour harmed."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cycle import FinishedCycle, copied
from PIL import Image

from blip_core import GeneratedCaption
from flows import models
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.caption import CaptionRows
from flows.steps.curate_shards import curate_shards
from flows.steps.decide import decide_round
from storage import Lake, caption_id, layout, query, read_image
from storage.fingerprint import basis_of
from storage.ids import image_id
from storage.tables import commit_part, rows_table

PART = "web-0001-99-00000"
TEXTS = {
    "long": "a red circle " * 3334,
    "emoji": "\U0001f389\U0001f40d\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "control": "\x07a\x1b[31m red\x7f\u200b",
    "right to left": "\u05e2\u05d9\u05d2\u05d5\u05dc \u05d0\u05d3\u05d5\u05dd \u202e red",
    "unknown": "zxqv jkvwq \u6f22\u5b57",
}
UNDECODABLE = {
    "truncated": "truncated",
    "zero bytes": "not_an_image",
    "1 x 10000": "too_thin: 1 x 10000",
    "bomb": "too_many_pixels",
}


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """By what is odd about them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = noise.convert("P", palette=Image.Palette.ADAPTIVE)
    grey16 = Image.fromarray(np.linspace(0, 65535, 4800).astype(np.uint16).reshape(60, 80))
    return {
        "truncated": _encoded(noise, "JPEG")[:1500],
        "zero bytes": b"",
        "cmyk": _encoded(noise.convert("CMYK"), "JPEG"),
        "16 bit": _encoded(grey16, "PNG"),
        "palette": _encoded(palette, "PNG", transparency=3),
        "animated": _encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)]),
        "1 x 1": _encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "1 x 10000": _encoded(Image.new("RGB", (1, 10_000), "red"), "PNG"),
        "64 megapixels": _encoded(Image.new("L", (8000, 8000), 90), "JPEG"),
        "bomb": _encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "turned": _encoded(noise, "JPEG", exif=exif),
    }


@pytest.fixture
def run(finished: FinishedCycle, tmp_path: Path) -> Run:
    cycle = copied(finished, tmp_path)
    return Run(Lake.open(str(cycle.lake)), parse_settings(cycle.settings), 1)


def _sound(run: Run, number: int) -> dict[str, bytes]:
    """Pictures that the round has captioned already."""
    rows = query(
        run.lake,
        "SELECT image_id, shard, \"offset\", size FROM pairs WHERE pool = 'web' AND status = 'ok' "
        f"ORDER BY image_id LIMIT {number}",
    ).to_pylist()
    return {
        f"sound {place}": read_image(run.lake, row["shard"], row["offset"], row["size"])
        for place, row in enumerate(rows)
    }


def _take_in(run: Run, pictures: dict[str, bytes], texts: dict[str, list[str]]) -> None:
    """Commit pictures and their web texts as one more part of the round."""
    pairs, captions = [], []
    for place, (name, data) in enumerate(pictures.items()):
        identity, shard = image_id(data), f"odd-{place:03}"
        run.lake.root.write_bytes(layout.shard(shard), data)
        pairs.append(
            {
                "key": f"odd-{place}",
                "pool": "web",
                "row": place,
                "source_name": "odd",
                "url": f"http://odd.test/{place}",
                "status": "ok",
                "attempts": 1,
                "shard": shard,
                "offset": 0,
                "size": len(data),
                "image_id": identity,
            }
        )
        captions += [
            {
                "caption_id": caption_id(identity, "web", text),
                "image_id": identity,
                "source": "web",
                "caption": text,
                "status": "ok",
                "round": 0,
            }
            for text in texts.get(name, [f"what is {name}"])
        ]
    basis = basis_of("odd", 1, {}, [])
    captions_table = rows_table("captions", captions)
    commit_part(run.lake, "captions", PART, captions_table, round=0, basis=basis)
    commit_part(run.lake, "pairs", PART, rows_table("pairs", pairs), basis=basis)


def _rows(run: Run, table: str, picture: bytes) -> list[dict[str, Any]]:
    """What the odd part's shard got for one picture."""
    path = run.lake.root.local_path(f"tables/{table}/round=0001/{PART}.parquet")
    sql = f"SELECT * FROM read_parquet('{path}') WHERE image_id = '{image_id(picture)}'"
    import duckdb

    return duckdb.sql(sql).to_arrow_table().to_pylist()


def test_odd_pictures_and_texts_have_an_outcome_each_and_neighbours_keep_theirs(run: Run) -> None:
    sound = _sound(run, 3)
    odd = odd_pictures()
    order = ["sound 0", *odd, "sound 1", "sound 2"]  # in one batch with what breaks
    every = odd | sound
    expected = {
        name: query(
            run.lake,
            "SELECT caption, mean_logprob FROM captions WHERE source = 'synthetic' AND round = 1 "
            f"AND image_id = '{image_id(data)}'",
        ).to_pylist()
        for name, data in sound.items()
    }
    _take_in(run, {name: every[name] for name in order}, {"sound 1": list(TEXTS.values())})
    for refs in ((models.captioner_ref(run), None), (None, models.scorer_ref(run))):
        curate_shards(run, *refs, lambda *told: None)
    for name, data in odd.items():
        captions, scores = _rows(run, "captions", data), _rows(run, "scores", data)
        if name in UNDECODABLE:
            assert [row["status"] for row in captions] == ["decode_error"], name
            assert [row["status"] for row in scores] == ["decode_error"], name
            assert UNDECODABLE[name] in scores[0]["error"]
            assert "0x" not in scores[0]["error"], "the same words in every run"
            continue
        assert {row["status"] for row in captions} <= {"ok", "empty", "degenerate"}, name
        assert captions[0]["num_tokens"] is not None
        assert {row["status"] for row in scores} == {"ok"}, name
        assert all(0 <= row["itm_prob"] <= 1 for row in scores)
    for name, data in sound.items():
        found = _rows(run, "captions", data)
        assert [row["caption"] for row in found] == [row["caption"] for row in expected[name]]
        for row, before in zip(found, expected[name], strict=True):
            assert row["mean_logprob"] == pytest.approx(before["mean_logprob"], abs=1e-5)
    texts = {row["caption_id"]: row for row in _rows(run, "scores", sound["sound 1"])}
    for text in TEXTS.values():
        row = texts[caption_id(image_id(sound["sound 1"]), "web", text)]
        assert row["status"] == "ok"
        assert -1 <= row["itc_sim"] <= 1


def test_texts_of_pictures_that_cannot_be_decoded_are_decided_with_the_reason(run: Run) -> None:
    odd = odd_pictures()
    _take_in(run, odd, {})
    for refs in ((models.captioner_ref(run), None), (None, models.scorer_ref(run))):
        curate_shards(run, *refs, lambda *told: None)
    settings = run.settings.with_changes({"machine": {"on_stale": "rebuild"}})
    decide_round(Run(run.lake, settings, 1))
    for name, why in UNDECODABLE.items():
        sql = f"SELECT kept, reason FROM verdicts WHERE image_id = '{image_id(odd[name])}'"
        (verdict,) = query(run.lake, sql).to_pylist()
        assert not verdict["kept"]
        assert verdict["reason"].startswith(f"not scored: {why}")


def test_captions_that_are_none_have_a_status_and_are_not_handed_on(run: Run) -> None:
    rows = CaptionRows(run, models.captioner_ref(run), basis_of("odd", 1, {}, []))
    said = [
        ("a red circle", -1.0, "sep", "ok"),
        ("red red red red", -0.1, "length", "degenerate"),
        ("red red red red", -0.1, "length", "repeated"),
        ("  ", -2.0, "sep", "empty"),
        ("", math.nan, "nan", "model_error"),
        ("a blue ring", -1.5, "sep", "ok"),
    ]
    captions = [GeneratedCaption(text, 4, logprob, why) for text, logprob, why, _ in said]
    handed_on = rows.made(0, "ab" * 16, captions)
    assert [text for _, text in handed_on] == ["a red circle", "a blue ring"]
    records = rows.records()
    assert [record["status"] for record in records] == [status for *_, status in said]
    assert [record["index"] for record in records] == list(range(6))
    kept = [record["caption"] for record in records]
    assert kept == ["a red circle", "red red red red", "red red red red", None, None, "a blue ring"]
    assert records[4]["mean_logprob"] is None
    table = rows_table("captions", records)
    assert table.num_rows == 6
