"""Let timm and transformers import beside a CPU build of torch.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU torch its compiled part cannot load, and
`import torchvision` fails because two operator schemas are missing. Declaring the two before the first
import is enough for everything used here (timm's models need no compiled operator).

The finder fires at the first `import torchvision` and never again; it imports nothing before that, and does
nothing when torch has CUDA or the compiled part loads.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # a torch Library undoes its definitions when it is collected


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Declares the missing operators when torchvision is about to be imported; finds nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            _remove()
            _declare_missing_operators()
        return None


def install() -> None:
    """Put the finder in front of `sys.meta_path`, once, unless torchvision is imported already."""
    installed = any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path)
    if not installed and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _TorchvisionFinder())


def _remove() -> None:
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _TorchvisionFinder)]


def _declare_missing_operators() -> None:
    import torch

    if torch.version.cuda is not None or _compiled_part_loads():
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _libraries.append(library)


def _compiled_part_loads() -> bool:
    import torch

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to repair: the import will say that torchvision is absent
    for compiled in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
        except OSError:
            return False
        return True
    return False
