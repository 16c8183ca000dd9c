import dataclasses
import json

import pytest

from blip_core import ConfigError, MEDConfig, TextConfig, VisionConfig
from blip_core.config import from_mapping

PRESETS = ("nano", "tiny", "small", "small_dinov2", "base", "large")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_a_round_trip_through_dictionaries(name: str) -> None:
    config = MEDConfig.preset(name)
    assert MEDConfig.from_dict(config.to_dict()) == config


def test_preset_takes_vocabulary_and_image_size() -> None:
    config = MEDConfig.preset("nano", vocab_size=77, image_size_px=128)
    assert (config.text.vocab_size, config.vision.image_size_px) == (77, 128)
    assert config.vision.num_tokens == 65


def test_preset_names_the_known_ones_when_unknown() -> None:
    with pytest.raises(ConfigError, match=r"nano.*large.*'huge'"):
        MEDConfig.preset("huge")


def test_from_dict_refuses_an_unknown_key_by_name() -> None:
    values = MEDConfig.preset("tiny").to_dict()
    values["vision"]["pach_size_px"] = 16
    with pytest.raises(ConfigError, match=r"vision: unknown pach_size_px"):
        MEDConfig.from_dict(values)


def test_from_dict_names_an_absent_key() -> None:
    values = MEDConfig.preset("tiny").to_dict()
    del values["text"]["depth"]
    with pytest.raises(ConfigError, match=r"text: depth must be given"):
        MEDConfig.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size_px": 40}, "image_size_px 40 must be a multiple of patch_size_px 16"),
        ({"num_heads": 3}, "vision width 32 must be a multiple of num_heads 3"),
        ({"depth": 0}, "depth must be above 0, got 0"),
        ({"stem": "patch"}, "stem must be linear or conv, got 'patch'"),
        ({"stem": "conv", "patch_size_px": 8, "image_size_px": 24}, None),
        ({"stem": "conv", "patch_size_px": 14, "image_size_px": 28}, "power of 2, got 14"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
    ],
)
def test_vision_config_names_field_value_and_bound(
    change: dict[str, object], message: str | None
) -> None:
    values = dataclasses.asdict(MEDConfig.preset("tiny").vision) | change
    if message is None:
        assert from_mapping(VisionConfig, values, "vision").patch_size_px == 8
        return
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**values)


def test_text_config_refuses_a_dropout_of_one() -> None:
    values = dataclasses.asdict(MEDConfig.preset("tiny").text)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        TextConfig(**values | {"dropout": 1.0})


def test_med_config_refuses_widths_that_do_not_meet() -> None:
    values = MEDConfig.preset("tiny").to_dict()
    values["text"]["encoder_width"] = 48
    with pytest.raises(ConfigError, match=r"encoder_width 48 must equal vision.width 32"):
        MEDConfig.from_dict(values)


def test_heads_come_in_one_order_and_survive_json() -> None:
    config = MEDConfig.preset("tiny", heads=("itm", "itc"))
    assert config.heads == ("itc", "itm")
    assert MEDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_written_before_there_were_heads_has_all() -> None:
    values = MEDConfig.preset("tiny").to_dict()
    del (
        values["heads"],
        values["text"]["pad_id"],
        values["text"]["sep_id"],
        values["text"]["dec_id"],
    )
    assert MEDConfig.from_dict(values) == MEDConfig.preset("tiny")


def test_an_unknown_head_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="heads must be of itc, itm, lm; got vqa"):
        MEDConfig.from_dict(MEDConfig.preset("tiny").to_dict() | {"heads": ["lm", "vqa"]})


def test_special_ids_are_bert_s_where_the_vocabulary_is() -> None:
    text = MEDConfig.preset("base").text
    assert [text.token_id(name) for name in ("pad_id", "sep_id", "dec_id")] == [0, 102, 30522]
    assert dataclasses.replace(text, sep_id=7).token_id("sep_id") == 7
    with pytest.raises(ConfigError, match="sep_id is not known for a vocabulary of 64: give the"):
        MEDConfig.preset("tiny").text.token_id("sep_id")
    with pytest.raises(ConfigError, match="dec_id 64 must be below vocab_size 64"):
        dataclasses.replace(MEDConfig.preset("tiny").text, dec_id=64)
