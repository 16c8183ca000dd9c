"""Captions are compared on the same images in every round, and with people's before there is a round to compare with."""

from pathlib import Path
from typing import Any

import pytest

from flows.session import Run
from flows.settings import parse_settings
from flows.steps.collapse import measure_captions
from storage import Lake, commit_part, query, rounds
from storage.fingerprint import basis_of
from storage.tables import rows_table

NUM_WEB, NUM_HUMAN = 300, 120


def _image(pool: str, number: int) -> str:
    return f"{pool}{number}".encode().hex().ljust(32, "0")[:32]


def _pair(pool: str, number: int) -> dict[str, Any]:
    about = {"key": f"{pool}-{number}", "pool": pool, "row": number, "source_name": pool}
    stored = {"shard": f"{pool}-0001-00-00000", "offset": 0, "size": 1}
    return about | stored | {"status": "ok", "attempts": 1, "image_id": _image(pool, number)}


def _commit(
    lake: Lake, table: str, rows: list[dict[str, Any]], round: int | None, tag: str
) -> None:
    basis = basis_of("test", 1, {"tag": tag}, [])
    commit_part(lake, table, f"{table}-{tag}", rows_table(table, rows), round=round, basis=basis)


def _captions(lake: Lake, round: int, texts: list[str], *, status: str = "ok") -> None:
    """One synthetic caption for each of as many web images, the first half a match."""
    said, judged = [], []
    for number, text in enumerate(texts):
        ids = {"caption_id": f"{round}-{number}", "image_id": _image("web", number)}
        made = {"source": "synthetic", "caption": text, "model_id": "c" * 32, "index": 0}
        said.append(ids | made | {"mean_logprob": -0.5, "status": status, "round": round})
        prob = 0.9 if number % 2 else 0.2
        judged.append(
            ids | {"model_id": "f" * 32, "itm_prob": prob, "status": "ok", "round": round}
        )
    _commit(lake, "captions", said, round, "synthetic")
    _commit(lake, "scores", judged, round, "synthetic")
    rounds.begin_round(lake, round, {})


def _run(lake: Lake, round: int, **gate: Any) -> Run:
    return Run(lake, parse_settings({"preset": None, "gate": gate}), round)


def _figures(lake: Lake, round: int, dataset: str = "captions") -> dict[str, tuple[float, int]]:
    sql = f"SELECT metric, value, n FROM metrics WHERE dataset = '{dataset}' AND round = {round}"
    return {row["metric"]: (row["value"], row["n"]) for row in query(lake, sql).to_pylist()}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    _commit(lake, "pairs", [_pair("web", number) for number in range(NUM_WEB)], None, "web")
    _commit(lake, "pairs", [_pair("human", number) for number in range(NUM_HUMAN)], None, "human")
    human = [
        {
            "caption_id": f"h{number}-{which}",
            "image_id": _image("human", number),
            "source": "human",
            "caption": f"person {number % 40} says {which}",
            "status": "ok",
            "round": 0,
        }
        for number in range(NUM_HUMAN)
        for which in range(2)
    ]
    _commit(lake, "captions", human, 0, "human")
    _captions(lake, 1, [f"thing {number}" for number in range(250)])
    return lake


def test_panel_has_as_many_images_as_people_captioned_and_is_the_same_in_every_round(
    lake: Lake,
) -> None:
    measure_captions(_run(lake, 1))
    first = _figures(lake, 1)
    assert first["distinct_share"] == (1.0, NUM_HUMAN)
    assert first["matched_share"][0] == pytest.approx(0.5, abs=0.15)
    people = _figures(lake, 1, "human-captions")
    assert people["distinct_share"][1] == NUM_HUMAN, "one caption for each picture"
    assert people["length_mean"][0] == 4
    assert "self_bleu" not in people
    # Images that are new in round 2, all captioned alike, are not of the panel.
    _captions(lake, 2, [*(f"thing {number}" for number in range(250)), *["same"] * 50])
    measure_captions(_run(lake, 2))
    assert _figures(lake, 2) == first
    assert _figures(lake, 2, "human-captions") == {}


def test_captions_that_say_the_same_and_failed_ones_show(lake: Lake) -> None:
    _captions(lake, 2, ["the same for all"] * 250)
    _captions(lake, 3, [""] * 250, status="empty")
    assert len(measure_captions(_run(lake, 3))) == 3, "the rounds before it too"
    assert _figures(lake, 2)["distinct_share"][0] == 1 / NUM_HUMAN
    assert _figures(lake, 2)["self_bleu"][0] == pytest.approx(1.0)
    assert _figures(lake, 3) == {"failed_share": (1.0, NUM_HUMAN)}


def test_figures_are_found_again_and_made_anew_when_captions_are(lake: Lake) -> None:
    (part,) = measure_captions(_run(lake, 1))
    before = lake.root.read_bytes(part.path)
    (again,) = measure_captions(_run(lake, 1))
    assert (again, lake.root.read_bytes(part.path)) == (part, before)
    basis = basis_of("test", 2, {}, [])
    rows = query(lake, "FROM captions WHERE round = 1")
    commit_part(lake, "captions", "captions-synthetic", rows, round=1, basis=basis)
    (anew,) = measure_captions(_run(lake, 1))
    assert anew.fingerprint != part.fingerprint


def test_fewer_captions_than_can_be_compared_are_not(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "few"), create=True)
    assert measure_captions(_run(lake, 1)) == []
    _captions(lake, 1, ["a text"] * 99)
    assert measure_captions(_run(lake, 1)) == []
