"""The commands that take something out of a lake: `export` a data set, `export-model` a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FORMATS = ("webdataset", "hf-parquet", "blip-json", "coco-json", "ids")


def register(commands: Any) -> None:
    """Add both commands."""
    _register_export(commands)
    text = "write a model of the lake for transformers"
    model = commands.add_parser("export-model", help=text, description=text)
    model.set_defaults(command=_export_model, name="export-model")
    model.add_argument("-v", "--verbose", action="store_true", help="logs and tracebacks")
    model.add_argument("role", choices=("captioner", "filter", "med"))
    model.add_argument("--lake", help="lake to read")
    model.add_argument("--round", type=int, help="the latest when not given, for med the champion")
    model.add_argument("--out", required=True, help="folder to write the model into")
    model.add_argument(
        "--layout",
        choices=("own", "hf-captioning", "hf-retrieval"),
        help="own, or a class of transformers; as the role needs when not given",
    )


def _register_export(commands: Any) -> None:
    text = "write a clean set for others to train on, or its ids"
    sub = commands.add_parser("export", help=text, description=text)
    sub.set_defaults(command=_export, name="export")
    sub.add_argument("-v", "--verbose", action="store_true", help="logs and tracebacks")
    sub.add_argument("--format", required=True, choices=FORMATS)
    sub.add_argument("--to", required=True, metavar="URI", help="folder that is new or empty")
    sub.add_argument("--lake", help="lake to read; else BOOTSTRAP_LAKE, else the last used here")
    sub.add_argument("--round", type=int, help="the last decided one when not given")
    sub.add_argument(
        "--policy", help="policy, generation or .sql file; else the one that counts in the round"
    )
    sub.add_argument(
        "--set",
        dest="params",
        action="append",
        default=[],
        metavar="PARAMETER=VALUE",
        help="a parameter of the policy, such as threshold=0.7; may be repeated",
    )
    sub.add_argument("--with-human", action="store_true", help="also what people captioned")
    sub.add_argument(
        "--captions",
        choices=("each", "list"),
        help="several texts of an image: a sample for each, or one sample with a list",
    )
    sub.add_argument(
        "--shard-images", type=int, default=10_000, help="images of a tar or Parquet file"
    )
    sub.add_argument("--csv", action="store_true", help="ids: CSV in place of Parquet")
    sub.add_argument("--name", dest="title", help="name of the data set in its card")
    sub.add_argument("--no-verify", action="store_true", help="do not read back what was written")
    sub.add_argument(
        "--on-stale",
        choices=("error", "rebuild"),
        default="error",
        help="what to do with another export in that folder",
    )


def _export(options: argparse.Namespace) -> int:
    from flows.cli import find_lake
    from flows.terminal import StageBars, console
    from storage import Lake
    from storage.exports import Options, export

    lake = Lake.open(find_lake(options.lake))
    wanted = Options(
        format=options.format,
        with_human=options.with_human,
        captions=options.captions,
        shard_images=options.shard_images,
        csv=options.csv,
        name=options.title,
    )
    with StageBars() as bars:
        done = export(
            lake,
            options.to,
            wanted,
            round=options.round,
            policy=options.policy,
            params=_params(options.params),
            verify=not options.no_verify,
            on_stale=options.on_stale,
            on_progress=lambda stage, done, total: bars(stage, done, total, "images"),
        )
    lines = [
        f"export: {done.uri}{' (it was there already)' if done.was_there else ''}",
        f"holds:  {done.num_texts} texts of {done.num_images} images, "
        f"as {done.generation} of round {done.round} decided",
        f"check:  {'read back: every hash and count is as written' if done.verified else 'not read back'}",
    ]
    if done.num_lost:
        lines.append(
            f"lost:   {done.num_lost} images could not be read; not_exported.jsonl says which and "
            "why"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _params(given: list[str]) -> dict[str, Any] | None:
    """PARAMETER=VALUE pairs; values as JSON has them, else as text. None when none is given."""
    from flows.errors import SettingsError

    params: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set {text!r} is not PARAMETER=VALUE, such as threshold=0.7")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value
    return params or None


def _export_model(options: argparse.Namespace) -> int:
    from flows.cli import find_lake
    from flows.model_export import export_model
    from flows.terminal import console
    from storage import Lake

    lake = Lake.open(find_lake(options.lake), read_only=True)
    ref = export_model(
        lake, options.role, Path(options.out), round=options.round, layout=options.layout
    )
    console.print(f"{ref.role} {ref.model_id} of round {ref.round}: {options.out}", highlight=False)
    return 0
