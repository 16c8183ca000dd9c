import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from blip_core import (
    CheckpointError,
    CorruptCheckpoint,
    MEDConfig,
    build_model,
    init_from_bert,
)
from blip_core.config import Head

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}


@pytest.fixture
def bert(tmp_path: Path) -> BertForMaskedLM:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SHAPE, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    return model


@torch.no_grad()
def test_text_mode_computes_what_bert_does(bert: BertForMaskedLM, tmp_path: Path) -> None:
    model = build_model(MEDConfig.preset("tiny", vocab_size=52), seed=0).eval()
    init_from_bert(model.text, tmp_path, lm_head=model.lm_head)
    ids = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ours = model.text(ids, mask, mode="text")
    theirs = bert.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1, :3], theirs[1, :3], atol=1e-4, rtol=1e-4)
    logits = model.lm_head(ours, model.text.word_embeddings.weight)[..., :50]
    expected = bert(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], expected[0], atol=1e-3, rtol=1e-3)


def test_both_roles_start_from_bert_and_new_rows_stay(
    bert: BertForMaskedLM, tmp_path: Path
) -> None:
    model = build_model(MEDConfig.preset("tiny", vocab_size=52), seed=0)
    new_rows = model.text.word_embeddings.weight[50:].clone()
    cross = model.text.layers[0].cross_attention.query.weight.clone()
    init_from_bert(model.text, tmp_path)
    layer = model.text.layers[1]
    assert torch.equal(layer.encoder_attention.qkv.weight, layer.decoder_attention.qkv.weight)
    assert layer.encoder_attention.qkv.weight is not layer.decoder_attention.qkv.weight
    assert torch.equal(model.text.word_embeddings.weight[50:], new_rows)
    assert torch.equal(model.text.layers[0].cross_attention.query.weight, cross)


def test_init_takes_the_first_layers_of_a_deeper_bert(
    bert: BertForMaskedLM, tmp_path: Path
) -> None:
    config = MEDConfig.preset("tiny", vocab_size=52)
    shallow = dataclasses.replace(config, text=dataclasses.replace(config.text, depth=1))
    whole, first = build_model(config, seed=0), build_model(shallow, seed=0)
    init_from_bert(whole.text, tmp_path)
    init_from_bert(first.text, tmp_path)
    wanted = whole.text.layers[0].encoder_attention.qkv.weight
    assert torch.equal(first.text.layers[0].encoder_attention.qkv.weight, wanted)
    assert len(first.text.layers) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "num_hidden_layers 2, but text.depth is 3"),
        ({"num_heads": 4}, "num_attention_heads 2, but text.num_heads is 4"),
        ({"vocab_size": 40}, "50 word pieces, but text.vocab_size is 40"),
        ({"max_positions": 60}, "48 positions, but text.max_positions is 60"),
    ],
)
def test_init_from_bert_names_a_shape_that_does_not_fit(
    bert: BertForMaskedLM, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    config = MEDConfig.preset("tiny", vocab_size=52)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **change))
    with pytest.raises(CheckpointError, match=message):
        init_from_bert(build_model(config, seed=0).text, tmp_path)


def test_init_from_bert_names_what_is_not_there(tmp_path: Path) -> None:
    model = build_model(MEDConfig.preset("tiny"), seed=0)
    with pytest.raises(CheckpointError, match=r"is not a BERT folder: config.json"):
        init_from_bert(model.text, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    with pytest.raises(CheckpointError, match=r"no BERT weights at .*model.safetensors"):
        init_from_bert(model.text, tmp_path)


@pytest.mark.parametrize(
    ("heads", "role"), [(("lm",), "decoder"), (("itc", "itm"), "encoder")], ids=["lm", "itc_itm"]
)
def test_a_model_of_one_role_starts_from_bert(
    bert: BertForMaskedLM, tmp_path: Path, heads: tuple[Head, ...], role: str
) -> None:
    model = build_model(MEDConfig.preset("tiny", vocab_size=52, heads=heads), seed=0)
    init_from_bert(model.text, tmp_path)
    query = model.text.get_parameter(f"layers.1.{role}_attention.qkv.weight").chunk(3)[0]
    assert torch.equal(query, bert.bert.encoder.layer[1].attention.self.query.weight)


def test_damaged_bert_weights_are_named(bert: BertForMaskedLM, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptCheckpoint, match=r"BERT weights .*model.safetensors cannot be read"):
        init_from_bert(build_model(MEDConfig.preset("tiny", vocab_size=52), seed=0).text, tmp_path)
