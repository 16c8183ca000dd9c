"""A model made ready for inference: its number type, and weights laid out as the CPU's matrix kernels read them.

oneDNN, which multiplies matrices for PyTorch on a CPU, reorders a plain weight in every call. Reordered once,
a product of few rows is about twice as fast, and a row's result depends less on how many others there are.

Dimension key: M rows, D inputs, O outputs.
"""

import copy
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.config import require
from blip_core.med import MED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["float32", "bfloat16", "float16"]

_MIN_ROWS = 4
"""Kernels for fewer rows add up in another order: such calls are filled up with zeros."""


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """`weight` (O, D) and `bias` (O,), float32 or bfloat16."""
        super().__init__()
        self.num_outputs = len(bias)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        num_rows = len(rows)
        if num_rows < _MIN_ROWS:
            rows = F.pad(rows, (0, 0, 0, _MIN_ROWS - num_rows))
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return outputs[:num_rows].view(*inputs.shape[:-1], self.num_outputs)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU and this PyTorch pack weights of `dtype`, and compute with them what they should.

    The operators are PyTorch's own, but not promised: where they are absent or differ, plain layers stay.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, inputs = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((24, 40), (24,), (6, 40))
    )
    try:
        found = PackedLinear(weight, bias)(inputs)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    return bool((found.float() - F.linear(inputs, weight, bias).float()).abs().max() < tolerance)


def for_inference(
    model: MED,
    *,
    device: torch.device | str,
    dtype: DType = "float32",
    compile: bool = False,
) -> MED:
    """Return a copy of `model` to compute with, on `device` and in `dtype`; it cannot be trained or saved.

    The copy shares what it need not change with `model`, which stays as it is: make a new copy when `model` has been
    trained further. With `compile` the vision blocks
    and the text's feed-forwards go through torch.compile, which takes a minute at the first call and needs a C++
    compiler or CUDA; weights are not packed then. Raises ConfigError for a `dtype` that there is not,
    and for a model that is such a copy itself.
    """
    is_copy = any(isinstance(part, PackedLinear) for part in model.modules())
    require(
        not is_copy,
        "the model is an inference copy with packed weights: give the model it was made from",
    )
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    device, number = torch.device(device), DTYPES[dtype]
    shared: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        moved = tensor.detach().to(device, number if tensor.is_floating_point() else None)
        is_parameter = isinstance(tensor, nn.Parameter)
        shared[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    ready = copy.deepcopy(model, shared).eval()
    if compile:
        for block in [*ready.vision.blocks, *(layer.feed_forward for layer in ready.text.stack())]:
            block.compile(dynamic=True)
    elif device.type == "cpu" and can_pack(number):
        _pack(ready)
    return ready


def _pack(model: MED) -> None:
    """Replace the linear layers, and the last matrix of the language model."""
    if "lm" in model.config.heads:
        words = model.text.word_embeddings.weight
        model.lm_head.packed = PackedLinear(words, model.lm_head.bias)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is not None:
                setattr(parent, name, PackedLinear(child.weight, child.bias))
