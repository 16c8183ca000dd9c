"""What encoder and decoder share, tensor by tensor, and the names of the released classes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from blip_core import MED, MEDConfig, load_official, save_official
from blip_core.layouts import export_tensors, med_entries

SHARED_MODULES = (  # of every layer
    "crossattention.self.query",
    "crossattention.self.key",
    "crossattention.self.value",
    "crossattention.output.dense",
    "crossattention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
OWN_MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
)


def _modules(depth: int, names: tuple[str, ...]) -> list[str]:
    return [f"encoder.layer.{index}.{name}" for index in range(depth) for name in names]


def _shared(depth: int) -> list[str]:
    embeddings = ["word_embeddings", "position_embeddings", "LayerNorm"]
    return [f"embeddings.{name}" for name in embeddings] + _modules(depth, SHARED_MODULES)


def _exported(model: MED) -> dict[str, Tensor]:
    names = list(model.vision.state_dict())
    return export_tensors(model.state_dict(), med_entries(model.config, names, hf=False))


def _parts(exported: dict[str, Tensor], module: str) -> list[tuple[Tensor, Tensor]]:
    """The encoder's and the decoder's weight, and bias where there is one."""
    pairs = []
    for part in ("weight", "bias"):
        name = f"{module}.{part}"
        if f"text_encoder.{name}" in exported:
            pairs.append((exported[f"text_encoder.{name}"], exported[f"text_decoder.bert.{name}"]))
    assert pairs, module
    return pairs


def _check_sharing(model: MED) -> None:
    exported = _exported(model)
    depth = model.config.text.depth
    for module in _shared(depth):
        assert all(e.data_ptr() == d.data_ptr() for e, d in _parts(exported, module)), module
    for module in _modules(depth, OWN_MODULES):
        for encoder, decoder in _parts(exported, module):
            assert encoder.data_ptr() != decoder.data_ptr(), module
            assert not torch.equal(encoder, decoder), module


def test_the_paper_s_model_shares_99_modules_and_keeps_120_tensors_apart() -> None:
    with torch.device("meta"):
        model = MED(MEDConfig.preset("base"))
    exported = _exported(model)
    assert len(_shared(12)) == 99
    apart = [name for module in _modules(12, OWN_MODULES) for name in _parts(exported, module)]
    assert len(apart) == 120
    assert sum(encoder.numel() for encoder, _ in apart) / 1e6 == pytest.approx(28.37, abs=0.005)
    covered = {f"{module}.{part}" for module in _shared(12) for part in ("weight", "bias")}
    covered |= {
        f"{module}.{part}" for module in _modules(12, OWN_MODULES) for part in ("weight", "bias")
    }
    found = {
        name.removeprefix("text_encoder.") for name in exported if name.startswith("text_encoder.")
    }
    assert found <= covered, "every tensor of the encoder is in one of the two lists"


def test_sharing_survives_an_optimizer_step_a_save_and_a_load(
    model: MED, pixel_values: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():  # norms start equal: tell the roles apart
        for name, parameter in model.named_parameters():
            if "decoder_attention" in name:
                parameter.add_(0.1)
    _check_sharing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([[5, 8, 9, 10]] * 2)
    embeds = model.encode_image(pixel_values[:2])
    before = _exported(model)["text_encoder.encoder.layer.1.intermediate.dense.weight"].clone()
    loss = model.lm_logits(embeds, ids, torch.ones_like(ids)).square().mean()
    (loss + model.itm_logits(embeds, ids, torch.ones_like(ids)).square().mean()).backward()
    optimizer.step()
    _check_sharing(model)
    model.save_pretrained(tmp_path / "own")
    _check_sharing(MED.from_pretrained(tmp_path / "own"))
    save_official(model, tmp_path / "model.pth")
    loaded = load_official(tmp_path / "model.pth", model.config).model
    _check_sharing(loaded)
    name = "text_decoder.bert.encoder.layer.1.intermediate.dense.weight"
    assert not torch.equal(_exported(loaded)[name], before), "the step reached both roles"


@pytest.mark.parametrize("preset", ["base", "large"])
@pytest.mark.parametrize(
    ("model_class", "heads"),
    [(BlipForConditionalGeneration, ("lm",)), (BlipForImageTextRetrieval, ("itc", "itm"))],
    ids=["captioner", "retrieval"],
)
def test_names_and_shapes_are_those_of_transformers(
    preset: str, model_class: type, heads: tuple[str, ...]
) -> None:
    size = {"image_size": 384}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {**size, **(large | {"num_attention_heads": 16} if preset == "large" else {})}
    with torch.device("meta"):
        theirs = model_class(BlipConfig(text_config={}, vision_config=vision))
        ours = MED(MEDConfig.preset(preset, image_size_px=384, heads=heads))
    entries = med_entries(ours.config, ours.vision.state_dict(), hf=True)
    exported = {name: t.shape for name, t in export_tensors(ours.state_dict(), entries).items()}
    assert exported == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    expected = {("base", "lm"): 473, ("large", "lm"): 617, ("base", "itc"): 472}
    assert len(exported) == expected.get((preset, heads[0]), 616)
