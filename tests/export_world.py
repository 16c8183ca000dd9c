"""A small lake with real pictures and one decided round: what exports are tested on.

Twelve web pictures in two shards, of which some must not leave the lake, and three that people captioned.
"""

import io
from pathlib import Path

from PIL import Image

from storage import Lake, commit_part, decide, ids
from storage.fingerprint import basis_of
from storage.shards import Sample, write_shard
from storage.tables import rows_table

BASIS = basis_of("made", 1, {}, [])
NUM_WEB = 12
ODD = 'Café ☕ 👩‍👩‍👧 "quoted" | <b>日本語</b>,\nsecond line'
"""Web text of picture 2."""
HELDOUT, OPTED_OUT, DROPPED = 3, 5, 6
"""Web pictures that are held out too, whose address has opted out since, and whose texts are all dropped."""
CANARY = 1
"""Human picture by which the filter is audited."""


def draw(number: int, kind: str = "JPEG") -> bytes:
    image = Image.new(
        "RGB", (24 + number, 16), (number * 20 % 256, 255 - number * 9, number * 53 % 256)
    )
    data = io.BytesIO()
    image.save(data, kind, quality=95)
    return data.getvalue()


def web_picture(number: int) -> bytes:
    return draw(number, {7: "PNG", 8: "WEBP"}.get(number, "JPEG"))


def web_text(number: int) -> str:
    return ODD if number == 2 else f"web text {number}"


def synthetic_texts(number: int) -> list[str]:
    """Two of every even picture, one of every odd one."""
    return [f"synthetic text {number}, take {take}" for take in range(2 - number % 2)]


def kept_texts(threshold: float = 0.5, with_human: bool = False) -> set[tuple[str, str, str]]:
    """(image_id, source, caption) of everything that may leave the lake."""
    kept = set()
    for number in range(NUM_WEB):
        if number in (HELDOUT, OPTED_OUT):
            continue
        image_id = ids.image_id(web_picture(number))
        for source, text, prob in texts_of(number):
            if prob >= threshold:
                kept.add((image_id, source, text))
    if with_human:
        for number in (0, 2):
            image_id = ids.image_id(draw(40 + number))
            kept |= {(image_id, "human", text) for text in human_texts(number)}
    return kept


def texts_of(number: int) -> list[tuple[str, str, float]]:
    """(source, text, itm_prob) of a web picture; every third web text is wrong."""
    texts = [("web", web_text(number), 0.2 if number % 3 == 1 else 0.6 + number / 100)]
    texts += [("synthetic", text, 0.9 - i / 10) for i, text in enumerate(synthetic_texts(number))]
    return [(s, t, 0.1) for s, t, _ in texts] if number == DROPPED else texts


def human_texts(number: int) -> list[str]:
    return [f"a person's text {number}", f"another person's text {number}"]


def write_lake(uri: str, activate: bool = True) -> Lake:
    """The lake, scored, and decided by the policy blip."""
    lake = Lake.open(uri, create=True)
    halves = (range(6), range(6, NUM_WEB))
    for index, numbers in enumerate(halves):
        _write_web(lake, f"web-0001-00-{index:05d}", list(numbers))
    _write_pool(lake, "human", [draw(40 + number) for number in range(3)])
    _write_pool(lake, "heldout", [web_picture(HELDOUT)])
    gone = _pair("opted", "web", NUM_WEB, status="opted_out", reason="noai")
    gone |= {"url": f"http://x/{OPTED_OUT}.jpg"}
    commit_part(lake, "pairs", "web-0002-00-00000", rows_table("pairs", [gone]), basis=BASIS)
    _write_canary(lake)
    _write_metrics(lake)
    decide(lake, 1, activate=activate)
    return lake


def _write_web(lake: Lake, shard: str, numbers: list[int]) -> None:
    pictures = {f"k{number:03d}": web_picture(number) for number in numbers}
    samples = [Sample(key=key, image=data, ext="jpg", meta={}) for key, data in pictures.items()]
    _, ranges = write_shard(lake, shard, samples)
    pairs, web, synthetic, scores = [], [], [], []
    for number, place in zip(numbers, ranges, strict=True):
        data = pictures[place.key]
        image_id = ids.image_id(data)
        pair = _pair(place.key, "web", number) | _stored(data, shard, place.offset)
        pairs.append(pair | {"licence": "CC-BY-4.0" if number % 2 == 0 else None})
        for source, text, prob in texts_of(number):
            caption = _caption(image_id, source, text)
            (web if source == "web" else synthetic).append(caption)
            scores.append(_score(caption, prob))
    for table, round, rows in (
        ("pairs", None, pairs),
        ("captions", 0, web),
        ("captions", 1, synthetic),
        ("scores", 1, scores),
    ):
        commit_part(lake, table, shard, rows_table(table, rows), round=round, basis=BASIS)


def _write_pool(lake: Lake, pool: str, pictures: list[bytes]) -> None:
    shard = f"{pool}-{pool}-00000"
    samples = [
        Sample(key=f"{pool}{i}", image=data, ext="jpg", meta={}) for i, data in enumerate(pictures)
    ]
    _, ranges = write_shard(lake, shard, samples)
    pairs, captions = [], []
    for number, (data, place) in enumerate(zip(pictures, ranges, strict=True)):
        stored = _stored(data, shard, place.offset)
        pairs.append(_pair(place.key, pool, number) | stored | {"url": f"{number:05d}.jpg"})
        captions += [_caption(ids.image_id(data), "human", text) for text in human_texts(number)]
    commit_part(lake, "pairs", shard, rows_table("pairs", pairs), basis=BASIS)
    commit_part(lake, "captions", shard, rows_table("captions", captions), round=0, basis=BASIS)


def _write_canary(lake: Lake) -> None:
    rows = [
        {"image_id": ids.image_id(draw(40 + number)), "is_canary": number == CANARY, "round": 1}
        for number in range(3)
    ]
    commit_part(
        lake, "canary_draws", "draw", rows_table("canary_draws", rows), round=1, basis=BASIS
    )


def _write_metrics(lake: Lake) -> None:
    of_filter = {"round": 1, "model_id": "f" * 32, "protocol": None}
    rows = [
        of_filter | {"dataset": "canaries", "metric": "noise_left", "value": 0.03, "low": 0.01, "high": 0.07, "n": 400},
        of_filter | {"dataset": "heldout", "metric": "mean_recall", "value": 0.5, "low": 0.4, "high": 0.6, "n": 50},
        of_filter | {"dataset": "train-filter", "metric": "loss", "value": 1.0, "low": None, "high": None, "n": 9},
    ]  # fmt: skip
    commit_part(lake, "metrics", "made", rows_table("metrics", rows), round=1, basis=BASIS)


def _pair(key: str, pool: str, number: int, status: str = "ok", reason: str | None = None) -> dict:
    return {
        "key": key,
        "pool": pool,
        "row": number,
        "source_name": "shop" if number % 2 else "b|og",
        "url": f"http://x/{number}.jpg",
        "status": status,
        "reason": reason,
        "attempts": 1,
    }


def _stored(data: bytes, shard: str, offset: int) -> dict:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    place = {"shard": shard, "offset": offset, "size": len(data)}
    return place | {"image_id": ids.image_id(data), "width": width, "height": height}


def _caption(image_id: str, source: str, text: str) -> dict:
    return {
        "caption_id": ids.caption_id(image_id, source, text),
        "image_id": image_id,
        "source": source,
        "caption": text,
        "model_id": "c" * 32 if source == "synthetic" else None,
        "status": "ok",
        "round": 1 if source == "synthetic" else 0,
    }


def _score(caption: dict, prob: float) -> dict:
    row = {name: caption[name] for name in ("caption_id", "image_id")}
    row |= {"model_id": "f" * 32, "itm_prob": prob, "itc_sim": prob - 0.25}
    return row | {"status": "ok", "round": 1}


def damage(lake_folder: Path, number: int) -> None:
    """Overwrite the bytes of a web picture in its shard."""
    data = web_picture(number)
    for tar in (lake_folder / "shards").glob("web-*.tar"):
        content = tar.read_bytes()
        place = content.find(data)
        if place >= 0:
            tar.write_bytes(content[:place] + bytes(len(data)) + content[place + len(data) :])
            return
    raise AssertionError(f"picture {number} is in no shard")
