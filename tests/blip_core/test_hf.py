"""Folders of transformers: what goes in, what comes out, and what is refused."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipProcessor,
)
from transformers_blip import SHAPES, build, save

from blip_core import (
    MED,
    CaptionConfig,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    EvalTransform,
    MEDCaptioner,
    MEDConfig,
    MEDTokenizer,
    build_model,
)

CLASSES = {
    "hf-captioning": BlipForConditionalGeneration,
    "hf-retrieval": BlipForImageTextRetrieval,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(build(BlipForConditionalGeneration, SHAPES["plain"]), tmp_path / "theirs")


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values[name] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", CLASSES)
def test_a_folder_goes_in_and_comes_out_unchanged(layout: str, name: str, tmp_path: Path) -> None:
    theirs = build(CLASSES[layout], SHAPES[name])
    save(theirs, tmp_path / "in")
    MED.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out", layout=layout)
    again, info = CLASSES[layout].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected = theirs.state_dict()
    assert set(expected) == set(again.state_dict())
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for section in ("text_config", "vision_config"):
        ours = {"vocab_size", "hidden_act", "layer_norm_eps", "image_size", "patch_size"}
        ours |= {"num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
        ours |= {"hidden_size", "intermediate_size", "encoder_hidden_size"}
        ours |= {"bos_token_id", "sep_token_id", "pad_token_id"}
        for key in ours & set(before[section]):
            assert before[section][key] == after[section][key], key


def test_a_pretrained_model_is_exported_as_both(
    model: MED, tokenizer: MEDTokenizer, pixel_values: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(3.25)
    ids = torch.tensor([[tokenizer.enc_id, 12, 13, tokenizer.sep_id]] * 2)
    mask = torch.ones_like(ids)
    model.save_pretrained(tmp_path / "filter", "hf-retrieval", tokenizer=tokenizer)
    theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path / "filter").eval()
    with torch.no_grad():
        expected = model.itm_logits(model.encode_image(pixel_values[:2]), ids, mask)
        found = theirs(pixel_values=pixel_values[:2], input_ids=ids, attention_mask=mask).itm_score
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    back = MED.from_pretrained(tmp_path / "filter")
    assert back.logit_scale.item() == 3.25
    assert back.config.heads == ("itc", "itm")


def test_an_exported_captioner_captions_in_transformers_as_here(
    model: MED, tokenizer: MEDTokenizer, tmp_path: Path
) -> None:
    from PIL import Image

    model.save_pretrained(tmp_path, "hf-captioning", tokenizer=tokenizer)
    picture = Image.new("RGB", (50, 40), (200, 30, 60))
    processor = BlipProcessor.from_pretrained(tmp_path)
    inputs = processor(images=picture, text="a picture of", return_tensors="pt")
    pixels = EvalTransform(32)(picture)[None]
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=0.02, rtol=0)
    config = CaptionConfig(decoding="greedy", max_new_tokens=8, prompt="a picture of")
    expected = MEDCaptioner(model, tokenizer, config).caption(inputs["pixel_values"], ["0"])[0][0]
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    suppressed = [token for token in tokenizer.special_ids if token != tokenizer.sep_id]
    ids = theirs.generate(
        **inputs, max_new_tokens=8, min_new_tokens=1, do_sample=False, suppress_tokens=suppressed
    )
    text = processor.decode(ids[0], skip_special_tokens=True)
    assert text == f"a picture of {expected.text}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_up(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = build(BlipForConditionalGeneration, SHAPES["plain"]).to(dtype)
    ours = MED.from_pretrained(save(theirs, tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    expected = theirs.vision_model.encoder.layers[1].mlp.fc1.weight.float()
    assert torch.equal(ours.vision.blocks[1].mlp.fc1.weight, expected)


def test_shards_are_read_as_one_file_is(folder: Path, tmp_path: Path) -> None:
    whole = MED.from_pretrained(folder).state_dict()
    theirs = BlipForConditionalGeneration.from_pretrained(folder)
    sharded = save(theirs, tmp_path / "sharded", max_shard_size="50KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    found = MED.from_pretrained(sharded).state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    tensors = load_file(str(shards[1]))
    save_file(dict(list(tensors.items())[1:]), str(shards[1]))
    with pytest.raises(CorruptCheckpoint, match=rf"{shards[1].name} does not hold what .* says"):
        MED.from_pretrained(sharded)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"names {shards[1].name}, which is not there"):
        MED.from_pretrained(sharded)


def test_an_index_that_points_elsewhere_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CorruptCheckpoint, match=r"names ../outside.safetensors, which is not be"):
        MED.from_pretrained(folder)
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(CorruptCheckpoint, match=r"index.json cannot be read: KeyError"):
        MED.from_pretrained(folder)


def test_old_files_with_tied_copies_and_buffers_are_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    expected = MED.from_pretrained(folder).state_dict()
    state = load_file(str(path))
    prefix = "text_decoder.cls.predictions."
    state[prefix + "decoder.weight"] = state[
        "text_decoder.bert.embeddings.word_embeddings.weight"
    ].clone()
    state[prefix + "decoder.bias"] = state.pop(prefix + "bias")
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(state, str(path))
    found = MED.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    state[prefix + "decoder.weight"] += 1.0
    save_file(state, str(path))
    with pytest.raises(CheckpointError, match=r"tied .* different in the file: .*decoder.weight"):
        MED.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "config.json has no text_config"),
        ({"model_type": "clip"}, "model_type is 'clip', not 'blip'"),
        ({"architectures": ["BlipModel"]}, r"\['BlipModel'\], but must be one of BlipForCond"),
        ({"architectures": []}, r"architectures is \[\], but must be one of"),
        (
            {"architectures": ["BlipForImageTextRetrieval"]},
            r"absent: itm_head.bias, .*; unexpected: text_decoder",
        ),
        ({"text_config": {"hidden_act": "gelu_new"}}, "text_config.hidden_act is 'gelu_new'"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act is 'relu'"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1, but a MED has 3 only"),
        ({"vision_config": {"image_size": 40}}, "image_size_px 40 must be a multiple of patch"),
        (
            {"text_config": {"hidden_size": 64}},
            r"word_embeddings.weight \(64, 32\) for \(64, 64\)",
        ),
        (
            {"vision_config": {"hidden_size": 64}},
            r"shape: .*crossattention.self.key.weight \(32, 32\) for \(32, 64\)",
        ),
        ({"text_config": {"vocab_size": 70}}, r"predictions.bias \(64,\) for \(70,\)"),
        ({"text_config": {"num_hidden_layers": 3}}, r"absent: .*layer.2.attention"),
        ({"vision_config": {"num_hidden_layers": 1}}, r"unexpected: vision_model.encoder.layers.1"),
        ({"text_config": {"num_attention_heads": 5}}, "32 must be a multiple of num_heads 5"),
        (
            {"vision_config": {"hidden_size": 0}},
            "vision_config.hidden_size is 0, but must be a who",
        ),
        (
            {"vision_config": {"patch_size": 0}},
            "vision_config.patch_size is 0, but must be a whole",
        ),
        (
            {"text_config": {"hidden_size": "64"}},
            "text_config.hidden_size is '64', but must be a w",
        ),
        (
            {"text_config": {"vocab_size": None}},
            "text_config.vocab_size is None, but must be a who",
        ),
        (
            {"text_config": {"pad_token_id": "0"}},
            "text_config.pad_token_id is '0', but must be a w",
        ),
        (
            {"vision_config": {"layer_norm_eps": "1e-5"}},
            "layer_norm_eps is '1e-5', but must be a nu",
        ),
        ({"image_text_hidden_size": 25.6}, ": image_text_hidden_size is 25.6, but must be a whole"),
        ({"logit_scale_init_value": "2.6"}, ": logit_scale_init_value is '2.6', but must be a num"),
        ({"architectures": 5}, "architectures is 5, but must be one of"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    _edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        MED.from_pretrained(folder)


def test_defaults_of_transformers_fill_what_the_config_leaves_out(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["text_config"]["num_attention_heads"]  # 8 there, whatever the hub's files say
    path.write_text(json.dumps(values))
    theirs = BlipForConditionalGeneration.from_pretrained(folder).config.text_config
    assert MED.from_pretrained(folder).config.text.num_heads == theirs.num_attention_heads == 8


def test_dropout_that_a_med_has_not_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3}
    _edit(folder, text_config=changes, vision_config={"attention_dropout": 0.2})
    with caplog.at_level(logging.WARNING):
        assert MED.from_pretrained(folder).config.text.dropout == 0.1
    assert "attention_probs_dropout_prob is 0.3; training here uses 0.1" in caplog.text
    assert "vision_config.attention_dropout is 0.2; training here uses 0.0" in caplog.text


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_cut_file_is_named(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors cannot be read"):
        MED.from_pretrained(folder)


def test_a_tensor_of_integers_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(str(path))
    name = "vision_model.post_layernorm.bias"
    save_file(state | {name: state[name].to(torch.int8)}, str(path))
    with pytest.raises(CheckpointError, match=rf"{name} of torch.int8, which is not floating"):
        MED.from_pretrained(folder)


def test_a_missing_or_damaged_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config.json cannot be read"):
        MED.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model at .*theirs: config.json is not there"):
        MED.from_pretrained(folder)


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights at .*neither model.safetensors nor"):
        MED.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/folder"])
def test_a_model_that_is_nowhere_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        MED.from_pretrained(name)


def test_a_model_of_the_hub_is_read_from_its_cache(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--someone--blip"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40))
    code = "from blip_core import MED; print(MED.from_pretrained('someone/blip').config.heads)"
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "('lm',)", done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "conv"}, "hf-captioning layout knows no vision stem 'conv'"),
        ({"layer_scale": 0.1}, "hf-captioning layout knows no vision layer_scale 0.1"),
    ],
)
def test_parts_that_transformers_has_not_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = MEDConfig.preset("tiny").to_dict()
    values["vision"] |= changes
    model = build_model(MEDConfig.from_dict(values), seed=0)
    with pytest.raises(ConfigError, match=message):
        model.save_pretrained(tmp_path, "hf-captioning")


def test_export_needs_to_know_the_special_ids(
    model: MED, tokenizer: MEDTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"pad_id is not known for a vocabulary of \d+: give the"):
        model.save_pretrained(tmp_path, "hf-captioning")
    with pytest.raises(ConfigError, match=r"layout must be one of own, hf-captioning, hf-retr"):
        model.save_pretrained(tmp_path, "hf")
    model.save_pretrained(tmp_path, "hf-captioning", tokenizer=tokenizer)
    text = MED.from_pretrained(tmp_path).config.text
    found = (text.pad_id, text.sep_id, text.dec_id)
    assert found == (tokenizer.pad_id, tokenizer.sep_id, tokenizer.dec_id)


@pytest.mark.parametrize(
    ("layout", "last_but_one"),
    [
        ("own", "tokenizer.json"),
        ("hf-captioning", "preprocessor_config.json"),
        ("hf-retrieval", "tokenizer_config.json"),
    ],
)
def test_config_is_written_last_in_every_layout(
    layout: Any, last_but_one: str, model: MED, tokenizer: MEDTokenizer, tmp_path: Path
) -> None:
    (tmp_path / last_but_one).mkdir()  # a file of that name cannot be written
    with pytest.raises(Exception, match="directory"):
        model.save_pretrained(tmp_path, layout, tokenizer=tokenizer)
    assert not (tmp_path / "config.json").exists(), "it says that the folder is whole"


def test_a_model_exports_only_what_it_has(tmp_path: Path) -> None:
    captioner = build_model(MEDConfig.preset("tiny", heads=("lm",)), seed=0)
    with pytest.raises(ConfigError, match=r"'hf-retrieval' needs the head 'itc', but this .* lm"):
        captioner.save_pretrained(tmp_path, "hf-retrieval")
    assert not list(tmp_path.iterdir())
