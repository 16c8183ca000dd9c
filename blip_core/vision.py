"""The vision encoder: a timm ViT, with the paper's linear patches or a small convolutional stem.

Dimension key: B batch, P image tokens (CLS first), D width, S image side.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blip_core.config import VisionConfig
from blip_core.errors import CheckpointError, CorruptCheckpoint


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
        **embed_layer,
    )
    _widen(vision.blocks, init_std(config.width) / init_std(768))
    return vision


def _widen(blocks: nn.Module, factor: float) -> None:
    """Scale the linear layers that timm started with a spread of 0.02."""
    with torch.no_grad():
        for part in blocks.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(factor)


def resize_positions(pos_embed: Tensor, num_patches: int) -> Tensor:
    """Resample position embeddings (1, 1 + n, D) bicubically to (1, 1 + num_patches, D).

    Square grids only; the CLS position is kept as it is.
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
        pos_embed, new_size=[new_side, new_side], old_size=[old_side, old_side], num_prefix_tokens=1
    )
    return resized


def load_timm_weights(vision: VisionTransformer, path: str | Path) -> None:
    """Load a timm safetensors file of a classifier-free ViT; strict but for the image size.

    Half-precision files are cast up. A classifier head in the file is ignored. Raises CheckpointError
    naming every key that is absent, unexpected or of another shape.
    """
    try:
        state = load_file(str(path))
    except FileNotFoundError as err:
        raise CheckpointError(f"no vision weights at {path}") from err
    except (SafetensorError, OSError) as err:
        raise CorruptCheckpoint(f"vision weights {path} cannot be read: {err}") from err
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    if "pos_embed" in state:
        num_patches = vision.patch_embed.num_patches
        state["pos_embed"] = resize_positions(state["pos_embed"].float(), num_patches)
    load_strict(vision, state, str(path))


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
        f"{label}: {', '.join(keys[:8])}{' and more' if len(keys) > 8 else ''}"
        for label, keys in (("absent", absent), ("unexpected", unexpected), ("shape", misfits))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit the model; {'; '.join(problems)}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
