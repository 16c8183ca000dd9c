import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from blip_core import CheckpointError, CorruptCheckpoint, MEDConfig, VisionConfig
from blip_core.vision import build_vision, encode_cls, load_timm_weights, resize_positions


def _tiny(**changes: object) -> VisionConfig:
    values = {"image_size_px": 32, "patch_size_px": 16, "width": 32, "depth": 2, "num_heads": 2}
    return VisionConfig(**values | changes)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_encoder_gives_normalised_tokens_with_cls_first(stem: str) -> None:
    vision = build_vision(_tiny(stem=stem, image_size_px=64)).eval()
    tokens = vision.forward_features(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 17), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"stem": "conv", "layer_scale": 0.1}])
def test_encode_cls_gives_what_the_whole_encoder_gives_for_cls(changes: dict[str, object]) -> None:
    vision = build_vision(_tiny(image_size_px=64, **changes)).eval()
    pixels = torch.randn(3, 3, 64, 64)
    expected = vision.forward_features(pixels)[:, 0]
    torch.testing.assert_close(encode_cls(vision, pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_every_vision_parameter_gets_a_gradient(stem: str) -> None:
    vision = build_vision(_tiny(stem=stem, layer_scale=0.1))
    vision.forward_features(torch.randn(2, 3, 32, 32)).square().mul(
        torch.randn(32)
    ).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vision.parameters())


def test_encoder_is_the_vit_of_timm() -> None:
    config = MEDConfig.preset("base", image_size_px=32).vision
    ours = build_vision(config)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=32)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert ours.norm.eps == 1e-6


def test_load_timm_weights_resizes_positions_and_ignores_the_head(tmp_path: Path) -> None:
    source = build_vision(_tiny(image_size_px=64))
    state = {name: tensor.half() for name, tensor in source.state_dict().items()}
    save_file(state | {"head.weight": torch.zeros(10, 32)}, str(tmp_path / "vit.safetensors"))
    target = build_vision(_tiny())
    load_timm_weights(target, tmp_path / "vit.safetensors")
    assert target.pos_embed.shape == (1, 5, 32)
    assert target.pos_embed.dtype == torch.float32
    torch.testing.assert_close(target.pos_embed[:, 0], state["pos_embed"][:, 0].float())
    torch.testing.assert_close(
        target.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"].float()
    )


def test_load_timm_weights_names_keys_that_do_not_fit(tmp_path: Path) -> None:
    state = build_vision(_tiny()).state_dict()
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 16)
    save_file(state, str(tmp_path / "vit.safetensors"))
    with pytest.raises(CheckpointError, match=r"absent: norm.bias; unexpected: extra; shape: cls_"):
        load_timm_weights(build_vision(_tiny()), tmp_path / "vit.safetensors")


def test_load_timm_weights_names_an_absent_or_damaged_file(tmp_path: Path) -> None:
    vision = build_vision(_tiny())
    with pytest.raises(CheckpointError, match=r"no vision weights at .*vit.safetensors"):
        load_timm_weights(vision, tmp_path / "vit.safetensors")
    (tmp_path / "vit.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{nonsense")
    with pytest.raises(CorruptCheckpoint, match=r"vit.safetensors cannot be read"):
        load_timm_weights(vision, tmp_path / "vit.safetensors")


def test_resize_positions_is_exact_at_the_same_size_and_smooth_at_another() -> None:
    ramp = torch.linspace(0, 1, 16).view(4, 4, 1).transpose(0, 1)
    positions = torch.cat([torch.full((1, 1, 1), 9.0), ramp.reshape(1, 16, 1)], dim=1)
    assert torch.equal(resize_positions(positions, 16), positions)
    larger = resize_positions(positions, 64)
    assert larger.shape == (1, 65, 1)
    assert larger[0, 0, 0] == 9.0
    assert larger[0, 1:].mean().item() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(CheckpointError, match="only square grids"):
        resize_positions(positions, 15)


TIMM_ARGUMENTS = {"img_size": 48, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """A folder of timm with a classifier, as its hub has them."""
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TIMM_ARGUMENTS)
    save_file(source.state_dict(), str(tmp_path / "model.safetensors"))
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": TIMM_ARGUMENTS,
        "pretrained_cfg": {"input_size": [3, 48, 48], "num_classes": 5, "classifier": "head"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@torch.no_grad()
def test_load_timm_weights_takes_a_name_of_timm(timm_folder: Path) -> None:
    ours = build_vision(_tiny(image_size_px=48)).eval()
    load_timm_weights(ours, f"local-dir:{timm_folder}")
    theirs = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.forward_features(pixels), theirs.forward_features(pixels))


@torch.no_grad()
def test_load_timm_weights_resizes_positions_as_timm_does(timm_folder: Path) -> None:
    ours = build_vision(_tiny(image_size_px=32))
    load_timm_weights(ours, f"local-dir:{timm_folder}")
    theirs = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, img_size=32)
    torch.testing.assert_close(ours.pos_embed, theirs.pos_embed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_bass_patch16_224", "timm knows no model 'vit_bass_patch16_224'"),
        ("vit_base_patch16", "knows no model 'vit_base_patch16'; near are vit_base_patch16"),
        ("vit_tiny_patch16_224.nothing", "weights of 'vit_tiny_patch16_224.nothing': Invalid"),
        ("vit_tiny_patch16_224", "cannot give the pretrained weights of 'vit_tiny_patch16_224'"),
        ("local-dir:nowhere", "cannot give the pretrained weights of 'local-dir:nowhere'"),
        ("somewhere/vit", "no vision weights at somewhere/vit"),
    ],
)
def test_load_timm_weights_names_a_model_it_cannot_get(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_timm_weights(build_vision(_tiny()), name)


def test_load_timm_weights_refuses_a_model_of_another_shape(timm_folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"unexpected: blocks.1.*shape: blocks.0.attn.proj.bi"
    ):
        load_timm_weights(build_vision(_tiny(width=64, depth=1)), f"local-dir:{timm_folder}")


@torch.no_grad()
def test_real_dinov2_weights_start_the_small_preset(shared_file: Callable[[str], Path]) -> None:
    path = shared_file("weights/vit_small_patch14_dinov2.fp16.safetensors")
    vision = build_vision(MEDConfig.preset("small_dinov2", image_size_px=56).vision).eval()
    load_timm_weights(vision, path)
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518).eval()
    theirs.load_state_dict(load_file(str(path)), strict=True)
    theirs.set_input_size(img_size=56)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = theirs.forward_features(pixels)
    torch.testing.assert_close(vision.forward_features(pixels), expected, atol=1e-4, rtol=1e-4)
