import pytest
from rounds_of_rows import BASIS, image, pair, write_world

from storage import layout
from storage.catalog import query
from storage.errors import ConfigError
from storage.lake import Lake
from storage.policy import decide
from storage.tables import commit_part, rows_table
from storage.trainset import build_trainset
from storage.why import why


@pytest.fixture
def trained(lake: Lake) -> Lake:
    """The made-up round, decided twice; a model that was trained on its clean set and one on nothing of it."""
    write_world(lake)
    decide(lake, 1)
    decide(lake, 1, "raw", activate=False)
    clean = build_trainset(lake, "SELECT image_id, caption, source FROM clean", name="clean")
    human = build_trainset(lake, "SELECT image_id, caption, source FROM human", name="human")
    for model_id, ref in (("new", clean), ("captioner", human)):
        row = {
            "model_id": model_id,
            "role": "med",
            "round": 1,
            "path": "x",
            "trained_on": ref.fingerprint,
        }
        commit_part(lake, "models", model_id, rows_table("models", [row]), round=1, basis=BASIS)
    return lake


def test_why_tells_an_image_from_its_row_to_the_models_trained_on_it(trained: Lake) -> None:
    found = why(trained, image(0))
    assert [row["url"] for row in found["rows"]] == ["http://x/0.jpg"]
    (shown,) = found["images"]
    web, synthetic = shown["texts"]
    assert (web["caption_id"], synthetic["caption_id"]) == ("w0", "s0")
    assert [(s["itm_prob"], s["filter_id"], s["round"]) for s in web["scores"]] == [(0.9, "f", 1)]
    fates = {d["policy"]: (d["kept"], d["reason"], d["counts"]) for d in synthetic["decisions"]}
    assert fates == {
        "blip": (True, "itm_prob >= 0.5", True),
        "raw": (False, "synthetic text: not used", False),
    }
    assert [model["model_id"] for model in web["trained"]] == ["new"]
    assert not shown["held_back"]
    assert why(trained, "http://x/0.jpg")["images"] == found["images"]


def test_why_knows_a_dropped_text_a_dead_address_and_a_held_out_image(trained: Lake) -> None:
    (text,) = [t for t in why(trained, image(1))["images"][0]["texts"] if t["caption_id"] == "w1"]
    assert text["trained"] == []
    assert {d["policy"]: d["kept"] for d in text["decisions"]} == {"blip": False, "raw": True}
    dead = why(trained, "http://x/4.jpg")
    assert (dead["images"], dead["rows"][0]["status"], dead["rows"][0]["reason"]) == (
        [],
        "http_4xx",
        "why not",
    )
    assert why(trained, image(2))["images"][0]["held_back"]


def test_why_of_a_caption_shows_that_text_alone(lake: Lake) -> None:
    write_world(lake)
    own = "c" * 32
    (part,) = query(lake, "FROM captions WHERE caption_id = 'w0'").to_pylist()
    rows = rows_table("captions", [part | {"caption_id": own}])
    commit_part(lake, "captions", "s", rows, round=0, basis=BASIS)
    commit_part(lake, "pairs", "s", rows_table("pairs", [pair(8) | {"shard": "s"}]), basis=BASIS)
    (shown,) = why(lake, own)["images"]
    assert [text["caption_id"] for text in shown["texts"]] == [own]


def test_why_says_when_a_training_set_is_gone_and_when_nothing_is_known(trained: Lake) -> None:
    models = query(
        trained, "SELECT model_id, trained_on FROM models WHERE model_id = 'new'"
    ).to_pylist()
    trained.root.remove(layout.trainset(models[0]["trained_on"]))
    (shown,) = why(trained, image(0))["images"]
    assert shown["training_sets_gone"] == ["new"]
    for unknown in ("f" * 32, "http://nowhere/", ""):
        with pytest.raises(
            ConfigError, match=r"nothing in .* is called .*exactly as it was listed"
        ):
            why(trained, unknown)
