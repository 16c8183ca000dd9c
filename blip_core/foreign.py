"""Other people's models: where their files are, which they are by their weights, and loading them whole.

Nothing that comes with a model is ever run: a model that needs code of its own is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from blip_core import hf
from blip_core.errors import CheckpointError, CorruptCheckpoint
from blip_core.training_state import hash_file
from blip_core.weight_files import INDEX, WEIGHTS, FindFile, listed

ID_LENGTH = 32
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PROCESSING_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What beside the weights decides what a model of transformers says."""


OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_REFUSALS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What transformers raises for a folder that is not what it should be; more kinds than it documents."""


def is_pth(path_or_repo: str | Path) -> bool:
    """Whether it is one file of weights, as BLIP's authors release them."""
    return Path(path_or_repo).suffix in (".pth", ".pt")


def read_config(path_or_repo: str | Path) -> dict[str, Any]:
    """Return the parsed config.json of a folder or a hub name.

    Raises CheckpointError when there is none, or when it is not one of transformers.
    """
    where = str(path_or_repo)
    path = hf.finder(path_or_repo)("config.json")
    if path is None:
        raise CheckpointError(
            f"no model at {where}: config.json is not there; give a folder that "
            "save_pretrained of transformers wrote, or a model's name on the hub"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{path} cannot be read: {err}") from err
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise CheckpointError(
            f"{path} names no model_type, so it is no model of transformers; a model of this "
            "project is named without a prefix"
        )
    return values


def weight_paths(path_or_repo: str | Path, *, of_open_clip: bool = False) -> dict[str, Path]:
    """The files of weights that transformers or open_clip would read, by name; a folder may hold those of both.

    Raises CheckpointError when there are none.
    """
    if is_pth(path_or_repo):
        file = Path(path_or_repo)
        if not file.is_file():
            raise CheckpointError(f"no weights at {file}: there is no such file")
        return {file.name: file}
    find = hf.finder(path_or_repo)
    if of_open_clip:
        for name in OPEN_CLIP_WEIGHTS:
            if (path := find(name)) is not None:
                return {name: path}
    for one, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        found = find(one)
        if found is not None:
            return {one: found}
        listing = find(index)
        if listing is not None:
            return _shards(find, listing)
    raise CheckpointError(
        f"no weights at {path_or_repo}: none of {WEIGHTS}, {INDEX}, {PICKLED}, {PICKLED_INDEX} is there"
    )


def _shards(find: FindFile, index: Path) -> dict[str, Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CorruptCheckpoint(f"{index} cannot be read: {err!r}") from err
    shards: dict[str, Path] = {}
    for name in names:
        path = find(str(name))
        if path is None:
            raise CheckpointError(f"{index} names {name}, which is not there; fetch it again")
        shards[str(name)] = path
    return shards


def foreign_model_id(path_or_repo: str | Path, *, of_open_clip: bool = False) -> str:
    """Return the id of a foreign model, 32 hex digits: a hash of the weights that transformers or open_clip reads.

    Of one model.safetensors or .pth it is the first digits of that file's sha256, as for our own models; of
    several files a hash of their names and hashes.
    """
    paths = weight_paths(path_or_repo, of_open_clip=of_open_clip)
    hashes = {name: hash_file(path) for name, path in paths.items()}
    if list(hashes) == [WEIGHTS] or is_pth(path_or_repo):
        return next(iter(hashes.values()))[:ID_LENGTH]
    return _digest(hashes)[:ID_LENGTH]


def processing_id(path_or_repo: str | Path) -> str:
    """Return a hash, 32 hex digits, of the small files that decide how a model reads and writes.

    The same weights with another tokenizer, prompt template or picture size say other things.
    """
    if is_pth(path_or_repo):
        return _digest({})[:ID_LENGTH]  # it has nothing beside it
    find = hf.finder(path_or_repo)
    found = {name: find(name) for name in PROCESSING_FILES}
    hashes = {name: hash_file(path) for name, path in found.items() if path is not None}
    return _digest(hashes)[:ID_LENGTH]


def _digest(hashes: dict[str, str]) -> str:
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_whole(
    auto_class: Any, path_or_repo: str | Path, dtype: torch.dtype, **options: Any
) -> torch.nn.Module:
    """Load a model of transformers in evaluation mode; every weight that it needs must be there.

    transformers fills what is missing with random numbers and says so in a log line; here it is an error.
    Raises CheckpointError naming the model.
    """
    where = str(path_or_repo)
    weight_paths(path_or_repo)
    with refusals(where, "the model"), _no_progress_bars():
        model, info = auto_class.from_pretrained(
            where, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{where} is no whole {type(model).__name__}: {len(absent)} of its weights are missing or have "
            f"another shape ({listed(absent, 3)}); give the checkpoint of that class, not of a "
            "relative of it"
        )
    loaded: torch.nn.Module = model.eval()
    return loaded


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Let transformers load without a bar of its own: whoever runs a stage has one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def refusals(where: str, what: str) -> Iterator[None]:
    """Turn what transformers raises while it loads `what` of a model into a CheckpointError naming it."""
    try:
        yield
    except _REFUSALS as err:
        said = " ".join(str(err).split())
        if "trust_remote_code" in said:
            raise CheckpointError(
                f"{where} needs code of its own, which is never run here; give a model whose class is "
                "part of transformers"
            ) from err
        raise CheckpointError(f"{what} of {where} cannot be loaded: {said[:400]}") from err


def load_part(
    load: Callable[..., Any], path_or_repo: str | Path, what: str, *files: Sequence[str]
) -> Any:
    """Load `what`: a processor, tokenizer or image processor, which is read from one of each group of `files`.

    transformers makes up a default for some files that are absent; here that is a CheckpointError naming them.
    """
    where = str(path_or_repo)
    find = hf.finder(path_or_repo)
    for group in files:
        if not any(find(name) for name in group):
            raise CheckpointError(
                f"{what} of {where} is not there: none of {', '.join(group)} is; save it beside the model "
                "with save_pretrained"
            )
    with refusals(where, what):
        return load(where, trust_remote_code=False)
