import logging
import shutil

import numpy as np
import pytest

from blip_core import ConfigError, caption_metrics
from blip_core.caption_evaluation import ptb_tokens

REFERENCES = {
    "a": ["a red ring on a blue wall", "a ring that is red"],
    "b": ["two dogs run over green grass", "dogs running on the grass"],
    "c": ["a man who rides a bicycle in town", "someone on a bicycle in a street"],
}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start; most tests do without it."""
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog, isn't it?", ["a", "man", "'s", "dog", "is", "n't", "it"]),
        ("they\u2019re well-known (really).", ["they", "'re", "well-known", "really"]),
        ("can't stop", ["ca", "n't", "stop"]),
        ("...", []),
    ],
)
def test_ptb_tokens_split_contractions_and_drop_punctuation(text: str, tokens: list[str]) -> None:
    assert ptb_tokens(text) == tokens


@pytest.mark.usefixtures("no_java")
def test_perfect_captions_score_full_marks() -> None:
    captions = {image: texts[0].upper() + "!" for image, texts in REFERENCES.items()}
    metrics = {metric.name: metric for metric in caption_metrics(captions, REFERENCES)}
    assert metrics["bleu4"].value == pytest.approx(1.0, abs=1e-6)
    assert metrics["rouge_l"].value == pytest.approx(1.0)
    assert metrics["cider"].value > 4.0
    assert {metric.n for metric in metrics.values()} == {3}
    assert metrics["cider"].low <= metrics["cider"].value <= metrics["cider"].high


@pytest.mark.usefixtures("no_java")
def test_wrong_captions_score_little_and_an_empty_one_is_allowed() -> None:
    captions = {"a": "two dogs run over green grass", "b": "", "c": "a red ring on a blue wall"}
    metrics = {metric.name: metric.value for metric in caption_metrics(captions, REFERENCES)}
    assert metrics["bleu4"] < 0.05
    assert metrics["cider"] < 0.5
    assert metrics["rouge_l"] < 0.4


@pytest.mark.usefixtures("no_java")
def test_bleu4_is_pycocoevalcaps_for_the_whole_and_for_every_resample() -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    said = ["a red ring on a wall", "two dogs run over the green grass", "a man on a bicycle"]
    names, texts = list("abcdefghi"), list(REFERENCES.values())
    references = {name: texts[place % 3] for place, name in enumerate(names)}
    captions = {name: said[(place + place // 6) % 3] for place, name in enumerate(names)}

    def bleu4(drawn: list[str]) -> float:
        truths = {f"{place}": references[name] for place, name in enumerate(drawn)}
        results = {f"{place}": [captions[name]] for place, name in enumerate(drawn)}
        return float(Bleu(4).compute_score(truths, results, verbose=0)[0][3])

    found = {metric.name: metric for metric in caption_metrics(captions, references)}["bleu4"]
    assert found.value == pytest.approx(bleu4(names))
    draws = np.random.default_rng(0).integers(0, 9, (1000, 9))
    drawn = [bleu4([names[image] for image in draw]) for draw in draws]
    assert [found.low, found.high] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])))
    assert 0.05 < found.low < found.value < found.high


@pytest.mark.usefixtures("no_java")
def test_figures_do_not_depend_on_the_order_of_images() -> None:
    captions = {image: texts[1] for image, texts in REFERENCES.items()}
    turned = dict(reversed(list(captions.items())))
    assert caption_metrics(turned, REFERENCES) == caption_metrics(captions, REFERENCES)


@pytest.mark.usefixtures("no_java")
def test_without_java_meteor_alone_is_absent_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    captions = {image: texts[1] for image, texts in REFERENCES.items()}
    with caplog.at_level(logging.WARNING):
        names = [metric.name for metric in caption_metrics(captions, REFERENCES)]
    assert names == ["cider", "bleu4", "rouge_l"]
    assert "METEOR is left out: it needs Java" in caplog.text


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java, which is absent")
def test_meteor_is_there_with_java_and_near_1_for_perfect_captions() -> None:
    metrics = caption_metrics({k: v[0] for k, v in REFERENCES.items()}, REFERENCES)
    assert metrics[-1].name == "meteor"
    assert 0.9 < metrics[-1].value <= 1.0
    assert metrics[-1].low <= metrics[-1].value <= metrics[-1].high
    assert metrics[-1].n == 3


def test_images_that_differ_or_lack_references_are_named() -> None:
    with pytest.raises(ConfigError, match="differ in images: b, c"):
        caption_metrics({"a": "x"}, REFERENCES)
    with pytest.raises(ConfigError, match="without a reference: a"):
        caption_metrics({"a": "x"}, {"a": []})
    with pytest.raises(ConfigError, match="no captions"):
        caption_metrics({}, {})
