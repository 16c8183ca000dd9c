"""What users make themselves: `python:FILE.py:FACTORY` or `python:MODULE:FACTORY`.

The factory of a captioner is called as `factory(config, device)`, with a `CaptionConfig` and a torch device, and returns a
`Captioner` (`blip_core/protocols.py`): anything with a `transform` and a `caption`. That of a check of pictures is called as
`factory(device)` and returns a function from a list of pictures to a list of reasons (`storage/intake/safety.py`). Their code
runs with the rights of the run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from blip_core import CaptionConfig, Captioner
from flows.errors import SettingsError
from storage.intake.safety import Judge

KIND = "python"
ID_LENGTH = 32


def plugin_id(where: str) -> str:
    """The id of `FILE.py:FACTORY`: a hash of the file that it is in and of its name.

    What that file imports is not in it: change the file (a version in a comment will do) when that changes.
    Raises SettingsError when there is no such file.
    """
    place, factory = _parts(where)
    source = _source(place, where).read_bytes()
    return hashlib.sha256(source + b"\0" + factory.encode()).hexdigest()[:ID_LENGTH]


def plugin_captioner(where: str, config: CaptionConfig, device: torch.device) -> Captioner:
    """The captioner that a factory gives. Raises SettingsError when it does not give one."""
    made, name = _factory(where)(config, device), _parts(where)[1]
    for needed in ("caption", "transform"):
        if not callable(getattr(made, needed, None)):
            raise SettingsError(
                f"{KIND}:{where}: {name} gave something ({type(made).__name__}) without `{needed}`; see "
                "`Captioner` in blip_core/protocols.py"
            )
    return cast("Captioner", made)


def plugin_judge(where: str, device: torch.device) -> Judge:
    """The check of pictures that a factory gives. Raises SettingsError when it does not give one."""
    made = _factory(where)(device)
    if not callable(made):
        raise SettingsError(
            f"{KIND}:{where}: it gave something ({type(made).__name__}) that cannot be called with pictures; see `Judge` in "
            "storage/intake/safety.py"
        )
    return cast("Judge", made)


def _factory(where: str) -> Callable[..., Any]:
    place, name = _parts(where)
    factory: Callable[..., Any] | None = getattr(_module(place, where), name, None)
    if factory is None:
        raise SettingsError(f"{KIND}:{where}: {place} has no {name}; name one of its functions")
    return factory


def _parts(where: str) -> tuple[str, str]:
    place, _, factory = where.rpartition(":")
    if not place or not factory.isidentifier():
        raise SettingsError(
            f"{KIND}:{where} names no function: give {KIND}:FILE.py:FUNCTION or {KIND}:MODULE:FUNCTION"
        )
    return place, factory


def _source(place: str, where: str) -> Path:
    """The file that holds a plug-in."""
    if place.endswith(".py"):
        path = Path(place).expanduser()
    else:
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError) as err:
            raise SettingsError(f"{KIND}:{where}: module {place} cannot be found: {err}") from err
        path = Path(spec.origin or "") if spec else Path()
    if not path.is_file():
        raise SettingsError(
            f"{KIND}:{where}: there is no {place}; give the path of a file, or put the module's folder "
            "on PYTHONPATH"
        )
    return path


def _module(place: str, where: str) -> ModuleType:
    path = _source(place, where)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        name = f"bootstrap_plugin_{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None, f"{path} has no import spec"
            assert spec.loader is not None, f"{path} has no loader"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[name] = module
        return sys.modules[name]
    except Exception as err:
        raise SettingsError(
            f"{KIND}:{where}: {path} cannot be imported: {type(err).__name__}: {err}"
        ) from err
