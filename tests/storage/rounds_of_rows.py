"""A small decided round written straight into tables: the world of the SQL tests."""

from storage.fingerprint import basis_of
from storage.lake import Lake
from storage.tables import commit_part, rows_table

BASIS = basis_of("made", 1, {}, [])


def image(i: int) -> str:
    return f"{i:032x}"


def pair(i: int, pool: str = "web", status: str = "ok", source_name: str = "shop") -> dict:
    row = {
        "key": f"{pool}-{i}",
        "pool": pool,
        "row": i,
        "source_name": source_name,
        "url": f"http://x/{i}.jpg",
        "alt_text": f"alt {i}",
        "status": status,
        "attempts": 1,
    }
    if status == "ok":
        row |= {"image_id": image(i), "shard": "s", "offset": 512 * i, "size": 100}
    else:
        row |= {"reason": "why not"}
    return row


def caption(name: str, i: int, source: str, round: int, status: str = "ok") -> dict:
    return {
        "caption_id": name,
        "image_id": image(i),
        "source": source,
        "caption": f"text {name}",
        "status": status,
        "round": round,
    }


def scored(name: str, i: int, itm_prob: float | None, round: int = 1) -> dict:
    status = "ok" if itm_prob is not None else "failed"
    row = {"caption_id": name, "image_id": image(i), "model_id": "f", "round": round}
    return (
        row
        | {"itm_prob": itm_prob, "itc_sim": itm_prob, "status": status}
        | ({"error": "cannot decode"} if itm_prob is None else {})
    )


def write_world(lake: Lake) -> None:
    """Images 0 to 3 of the web (2 also held out), one dead URL, one human pair; round 1 scored."""
    pairs = [
        *(pair(i) for i in range(3)),
        pair(3, source_name="blog"),
        pair(4, status="http_4xx"),
        pair(2, pool="heldout"),
        pair(9, pool="human"),
    ]
    web = [caption(f"w{i}", i, "web", 0) for i in range(4)]
    human = [caption("h9", 9, "human", 0), caption("h2", 2, "human", 0)]
    synthetic = [
        *(caption(f"s{i}", i, "synthetic", 1) for i in range(4)),
        caption("s-failed", 1, "synthetic", 1, status="failed"),
    ]
    probs = {"w0": 0.9, "w1": 0.1, "w2": 0.8, "w3": 0.5, "s0": 0.7, "s1": None, "s2": 0.2}
    scores = [scored(name, int(name[1]), prob) for name, prob in probs.items()]
    for table, round, rows in (
        ("pairs", None, pairs),
        ("captions", 0, [*web, *human]),
        ("captions", 1, synthetic),
        ("scores", 1, scores),
    ):
        commit_part(lake, table, "p", rows_table(table, rows), round=round, basis=BASIS)
