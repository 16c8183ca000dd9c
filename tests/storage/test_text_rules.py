"""Alt texts that are no captions are told by name, and captions are let through."""

from collections import Counter
from pathlib import Path

import pytest
from web_world import PictureServer, download_config, write_list

from storage import ConfigError, Lake, UrlListConfig, ingest_urls, part_manifest, query
from storage.intake.text_rules import ALL, RULES, checked_rules, rule_met

EVERY = checked_rules([ALL])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("12345", "no_letters"),
        ("-- !!", "no_letters"),
        ("😀😀", "no_letters"),
        ("a 4", "too_short"),
        ("x y z", "too_short"),
        ("word " * 300, "too_long"),
        ("DSC_0042.JPG", "file_name"),
        ("my-holiday-2019.jpeg", "file_name"),
        ("IMG_2019 (3)", "file_name"),
        ("Screenshot 2023-01-02", "file_name"),
        ("buy at https://shop.test/a now", "url_like"),
        ("more on www.shop.test", "url_like"),
        ("Image", "boilerplate"),
        ("Click to enlarge.", "boilerplate"),
        ("Logo", "boilerplate"),
        ("write to anna.b@mail.example.org", "e_mail"),
        ("call +49 (30) 1234-5678 today", "phone"),
        ("call 030/12345678", "phone"),
        ("call (555) 123 4567", "phone"),
        ("555-123-4567", "no_letters"),
        ("tel. 555.123.4567", "phone"),
    ],
)
def test_what_is_no_caption_meets_its_rule(text: str, rule: str) -> None:
    assert rule_met(text, EVERY) == rule


@pytest.mark.parametrize(
    "text",
    [
        "a dog on a beach",
        "Image of a lighthouse at night",
        "the logo of a bakery, 1998",
        "Boeing 747-400 at Frankfurt, 2011",
        "a photo taken on 2019-05-04 in Rome",
        "Olympic games 1936 1948 1952",
        "犬が走る",
        "собака на пляже",
        "ein Bär, 3 Kilo schwer",
        "1990 Toyota Corolla",
        "born 12.05.1931, died 3.11.2004",
        "ISBN 978-3-16-148410-0",
        "100 000 000 stars",
        "painting, oil on canvas, 120 x 80 cm",
    ],
)
def test_captions_pass(text: str) -> None:
    assert rule_met(text, EVERY) is None


def test_rules_are_named_in_their_order_and_unknown_ones_refused() -> None:
    assert checked_rules(["phone", "url_like"]) == ("url_like", "phone")
    assert checked_rules([]) == ()
    assert (*RULES, "placeholder") == EVERY
    with pytest.raises(ConfigError, match="speling is no rule; there are no_letters, "):
        checked_rules(["speling"])
    with pytest.raises(ConfigError, match="speling is no rule"):
        download_config(PictureServer(), text_rules=("speling",))


def test_a_rule_takes_the_text_and_leaves_the_image(
    tmp_path: Path, pictures: PictureServer
) -> None:
    texts = ["a cat asleep", "DSC_0042.JPG", "Image", "write to a@b.example", "", "two dogs"]
    rows = [(f"ok{n + 40}.jpg", text) for n, text in enumerate(texts)]
    path = write_list(tmp_path / "urls.parquet", rows, host="rules.test")
    found = {}
    for name, rules in (("without", ()), ("with", ("all",)), ("some", ("e_mail",))):
        lake = Lake.open(str(tmp_path / name), create=True)
        config = download_config(pictures, text_rules=rules)
        parts = ingest_urls(lake, UrlListConfig(path=str(path)), config, round=1)
        assert query(lake, "FROM pairs WHERE status = 'ok'").num_rows == 6
        rows_of = query(lake, "SELECT status FROM captions").to_pylist()
        found[name] = Counter(row["status"] for row in rows_of)
        [texts_part] = [part for part in parts if part.table == "captions"]
        manifest = part_manifest(lake, texts_part)
        assert (manifest.num_in, manifest.num_ok) == (6, found[name]["ok"])
        assert manifest.reasons["no_text"] == 1
        assert query(lake, "FROM raw").num_rows == found[name]["ok"]
    assert found["without"] == {"ok": 5}
    assert found["with"] == {"ok": 2, "file_name": 1, "boilerplate": 1, "e_mail": 1}
    assert found["some"] == {"ok": 4, "e_mail": 1}
    lines = query(lake, "SELECT outcome, rows FROM funnel WHERE stage = 'texts'").to_pylist()
    assert {row["outcome"]: row["rows"] for row in lines} == {"web": 4, "web, e_mail": 1}
