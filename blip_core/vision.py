"""The vision encoder: a timm ViT, with the paper's linear patches or a small convolutional stem.

Dimension key: B batch, P image tokens (CLS first), D width, S image side.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from blip_core.attention import attend
from blip_core.config import VisionConfig
from blip_core.errors import CheckpointError
from blip_core.split_tensors import fill
from blip_core.weight_files import listed, read_safetensors


class VisionAttention(Attention):  # type: ignore[misc]
    """timm's attention, with the kernel that `attend` chooses."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        first_only: bool = False,
    ) -> Tensor:
        """(B, P, D) -> (B, P, D), or (B, 1, D) with `first_only`; every token sees all."""
        if attn_mask is not None or is_causal:
            raise ValueError("image tokens are not masked")
        num_rows, num_tokens, _ = x.shape
        qkv = self.qkv(x).view(num_rows, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(query[:, :, :1] if first_only else query, key, value, None)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class ConvStem(nn.Module):
    """Strided 3x3 convolutions in place of one linear projection per patch.

    Pixels are halved until one is left per patch (16 px: four times); channels double on the way.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any
    ) -> None:
        super().__init__()
        num_halvings = int(math.log2(patch_size))
        side = img_size // patch_size
        self.grid_size = (side, side)
        self.num_patches = side * side
        layers: list[nn.Module] = []
        channels = in_chans
        for index in range(num_halvings):
            is_last = index == num_halvings - 1
            out = embed_dim if is_last else max(8, embed_dim >> (num_halvings - 1 - index))
            layers.append(nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1))
            if not is_last:
                layers += [nn.GroupNorm(1, out), nn.GELU()]
            channels = out
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P - 1, D)."""
        grid: Tensor = self.layers(pixel_values)
        return grid.flatten(2).transpose(1, 2)


def init_std(width: int) -> float:
    """Return the spread of initial weights: 0.02 as in BERT and ViT at their width 768, more when narrower.

    A sum over `width` inputs then starts equally large at every width. A narrow model that starts with 0.02
    hardly learns in its first hundreds of steps.
    """
    return 0.02 * max(1.0, math.sqrt(768 / width))


def build_vision(config: VisionConfig) -> VisionTransformer:
    """Build the encoder; `forward_features` gives (B, P, D), CLS first, all tokens normalised."""
    embed_layer = {"embed_layer": ConvStem} if config.stem == "conv" else {}
    vision = VisionTransformer(
        img_size=config.image_size_px,
        patch_size=config.patch_size_px,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        init_values=config.layer_scale,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        num_classes=0,
        global_pool="",
        attn_layer=VisionAttention,
        **embed_layer,
    )
    _widen(vision.blocks, init_std(config.width) / init_std(768))
    return vision


def encode_cls(vision: VisionTransformer, pixel_values: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, D): what `forward_features` gives for CLS, the last block spared all other tokens."""
    hidden = vision.norm_pre(vision.patch_drop(vision._pos_embed(vision.patch_embed(pixel_values))))
    *blocks, last = vision.blocks
    for block in blocks:
        hidden = block(hidden)
    mixed = last.attn(last.norm1(hidden), first_only=True)
    first = hidden[:, :1] + last.drop_path1(last.ls1(mixed))
    first = first + last.drop_path2(last.ls2(last.mlp(last.norm2(first))))
    cls_embeds: Tensor = vision.norm(first)[:, 0]
    return cls_embeds


def _widen(blocks: nn.Module, factor: float) -> None:
    """Scale the linear layers that timm started with a spread of 0.02."""
    with torch.no_grad():
        for part in blocks.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(factor)


def resize_positions(pos_embed: Tensor, num_patches: int, *, antialias: bool = False) -> Tensor:
    """Resample position embeddings (1, 1 + n, D) bicubically to (1, 1 + num_patches, D).

    Square grids only; the CLS position is kept as it is. BLIP and transformers do not smooth when the grid
    shrinks, timm does (`antialias`); when it grows they agree.
    """
    num_old = pos_embed.shape[1] - 1
    old_side, new_side = math.isqrt(num_old), math.isqrt(num_patches)
    if old_side**2 != num_old or new_side**2 != num_patches:
        raise CheckpointError(
            f"position embeddings of {num_old} patches cannot become {num_patches}: "
            "only square grids can be resized"
        )
    if num_old == num_patches:
        return pos_embed
    resized: Tensor = resample_abs_pos_embed(
        pos_embed,
        new_size=[new_side, new_side],
        old_size=[old_side, old_side],
        num_prefix_tokens=1,
        antialias=antialias,
    )
    return resized


def load_timm_weights(vision: VisionTransformer, path_or_name: str | Path) -> None:
    """Start from a timm ViT: a safetensors file, or a model's name; strict but for the image size.

    A name is what `timm.create_model` knows with pretrained weights: `vit_base_patch16_224.augreg_in21k`,
    `hf-hub:...` or `local-dir:...`. Half precision is cast up and a classifier head is ignored. Raises
    CheckpointError naming every key that is absent, unexpected or of another shape, or the name when timm
    has no such model or cannot fetch it.
    """
    name = str(path_or_name)
    state = _timm_state(name) if _is_timm_name(name) else read_safetensors(name, "vision weights")
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    positions = state.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        num_patches = vision.patch_embed.num_patches
        state["pos_embed"] = resize_positions(positions.float(), num_patches, antialias=True)
    load_strict(vision, state, name)


def _is_timm_name(name: str) -> bool:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return True
    is_path = name.endswith(".safetensors") or Path(name).name != name or Path(name).exists()
    return not is_path


def _timm_state(name: str) -> dict[str, Tensor]:
    """Weights of a timm model by its name, classifier left out."""
    is_known = ":" in name or timm.is_model(name)
    if not is_known:
        near = timm.list_models(f"{name.split('.')[0]}*", pretrained=True)[:3]
        hint = f"; near are {', '.join(near)}" if near else "; timm.list_models('vit*') lists them"
        raise CheckpointError(f"timm knows no model {name!r}{hint}")
    try:
        state: dict[str, Tensor] = timm.create_model(
            name, pretrained=True, num_classes=0
        ).state_dict()
    except (RuntimeError, OSError, ValueError, AssertionError) as err:
        raise CheckpointError(
            f"timm cannot give the pretrained weights of {name!r}: {err}; "
            "check the name and the network, or give a safetensors file"
        ) from err
    return state


def load_strict(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy `state` into `module`; every key and shape must fit, else CheckpointError names them."""
    own = module.state_dict()
    absent = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    misfits = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(state))
        if own[key].shape != state[key].shape
    ]
    problems = [
        f"{label}: {listed(keys)}"
        for label, keys in (("absent", absent), ("unexpected", unexpected), ("shape", misfits))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit the model; {'; '.join(problems)}")
    for key, tensor in own.items():
        fill(tensor, state[key])
