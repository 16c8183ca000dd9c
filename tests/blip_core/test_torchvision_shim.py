import subprocess
import sys

PROGRAM = """
import sys
import blip_core
assert "torch" not in sys.modules, "importing the package must stay light"
assert type(sys.meta_path[0]).__name__ == "_TorchvisionFinder"
import timm
import torchvision
assert "_TorchvisionFinder" not in [type(finder).__name__ for finder in sys.meta_path]
import torch
from torchvision.transforms import v2
print(hasattr(torch.ops.torchvision, "nms"), len(timm.list_models()) > 100)
"""


def test_timm_and_torchvision_import_after_the_package() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "True"]


def test_every_public_name_resolves_and_the_list_is_sorted() -> None:
    import blip_core

    assert list(blip_core.__all__) == sorted(blip_core.__all__)
    for name in blip_core.__all__:
        assert getattr(blip_core, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    import blip_core

    assert not hasattr(blip_core, "nothing_of_that_name")
