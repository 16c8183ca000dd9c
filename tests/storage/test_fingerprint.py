import pytest

from storage.fingerprint import basis_of, canonical, explain, fingerprint, fingerprint_of
from storage.ids import caption_id, image_id, pair_key


def test_fingerprint_ignores_the_order_of_settings_and_sees_all_else() -> None:
    same = fingerprint("score", 1, {"a": 1, "b": 2}, ["x"], "m")
    assert same == fingerprint("score", 1, {"b": 2, "a": 1}, ["x"], "m")
    assert same == fingerprint_of(basis_of("score", 1, {"a": 1, "b": 2}, ["x"], "m"))
    others = {
        fingerprint("caption", 1, {"a": 1, "b": 2}, ["x"], "m"),
        fingerprint("score", 2, {"a": 1, "b": 2}, ["x"], "m"),
        fingerprint("score", 1, {"a": 1, "b": 3}, ["x"], "m"),
        fingerprint("score", 1, {"a": 1, "b": 2}, ["x", "y"], "m"),
        fingerprint("score", 1, {"a": 1, "b": 2}, ["x"], "n"),
    }
    assert same not in others
    assert len(others) == 5


def test_canonical_refuses_what_has_no_one_spelling() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"x": float("nan")})


def test_explain_names_nested_fields_that_differ_or_are_absent() -> None:
    old = {"caption": {"top_p": 0.9, "gone": 1}, "inputs": ["a"]}
    new = {"caption": {"top_p": 0.8}, "inputs": ["a", "b"]}
    assert explain(old, new) == [
        "caption.gone: 1 -> (absent)",
        "caption.top_p: 0.9 -> 0.8",
        "inputs[1]: (absent) -> b",
    ]
    assert explain(old, old) == []


def test_ids_are_the_first_half_of_sha256() -> None:
    assert image_id(b"abc") == "ba7816bf8f01cfea414140de5dae2223"


def test_ids_differ_when_fields_only_join_to_the_same_text() -> None:
    assert caption_id("a", "web", "x") != caption_id("a", "we", "bx")
    assert pair_key("s", "u", None) == pair_key("s", "u", "")
