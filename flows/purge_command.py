"""`bootstrap purge`: images out of a lake for good, on request, with proof."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage import Lake
    from storage.purge import Plan, Proof, Purged, Request

SHOWN = 3
"""Pictures that look the same: that many are named."""
EXPORTS = (
    "exports are folders outside the lake and are not recorded in it: what they hold of this cannot be called back from "
    "here. The same export to the same folder now says that it is stale"
)


def register(commands: Any, command: Any) -> None:
    """Add the command."""
    sub = command(commands, "purge", "take images out of a lake for good, and prove it", _purge)
    sub.add_argument("--url", action="append", default=[], help="an address; may be repeated")
    sub.add_argument("--image-id", action="append", default=[], metavar="ID", help="an image")
    sub.add_argument(
        "--host",
        action="append",
        default=[],
        help="a host with its subdomains, now and in later lists",
    )
    sub.add_argument(
        "--file", type=Path, help="one address, image_id or host a line; # begins a comment"
    )
    sub.add_argument("--because", help="why, and who asked: it is recorded")
    sub.add_argument("--dry-run", action="store_true", help="say what would go, touch nothing")
    sub.add_argument("--resume", action="store_true", help="finish a purge that was killed")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write plan and proof to a file")
    sub.add_argument("--lake", help="lake to work on; else BOOTSTRAP_LAKE, else the last used here")
    sub.add_argument(
        "--scratch", type=Path, help="where machine.scratch puts unfinished work, if set"
    )


def _purge(options: argparse.Namespace) -> int:
    from flows.cli import find_lake
    from flows.purge_bases import around
    from storage import Lake
    from storage.purge import find, purge, resume

    scratch = options.scratch.expanduser().resolve() if options.scratch else None
    lake = Lake.open(find_lake(options.lake), read_only=options.dry_run, scratch_root=scratch)
    if options.resume:
        done = resume(lake, around(_tell))
        _show(["no purge was left unfinished"] if done is None else lines_of(done))
    else:
        request = _request(options)
        _show(f"{options.file}, {line}: skipped" for line in request.bad_lines)
        if options.dry_run:
            found = find(lake, request, around(_tell).content_changes)
            _show(_dry_lines(lake, found.plan, len(found.already)))
            _write_json(options.json, {"dry_run": True, "plan": _plan_data(found.plan)}, found.rows)
            return 0
        done = purge(lake, request, around(_tell))
        _show(lines_of(done))
    if done is not None:
        _write_json(options.json, data_of(done), done.rows)
    return 0


def _request(options: argparse.Namespace) -> Request:
    """What the options ask for. Raises ConfigError naming what is wrong with it."""
    from storage.purge import Request, asked_host, asked_image, asked_url, read_list

    because = options.because or ""
    asked = [asked_url(text) for text in options.url]
    asked += [asked_image(text) for text in options.image_id]
    asked += [asked_host(text) for text in options.host]
    if options.file is None:
        return Request(asked=tuple(dict.fromkeys(asked)), because=because)
    listed = read_list(options.file, because)
    return Request(
        asked=tuple(dict.fromkeys([*asked, *listed.asked])),
        because=because,
        is_list=True,
        bad_lines=listed.bad_lines,
    )


def _tell(what: str, done: int, total: int) -> None:
    """A line a step, on the error stream: the answer may be read by a program."""
    if done == total:
        sys.stderr.write(f"{what}: {total} cleared\n")


def _dry_lines(lake: Lake, plan: Plan, num_already: int) -> Iterator[str]:
    from storage import layout

    if not plan.num_rows:
        yield f"nothing is left to purge: {num_already:,} input rows were purged before"
        return
    yield f"would purge {_size(plan)}"
    yield from _plan_lines(plan)
    if lake.root.exists(layout.PURGE_BEGUN):
        yield "another purge was begun and not finished; it would be finished first"
    yield "nothing was touched"


def lines_of(done: Purged) -> Iterator[str]:
    """A finished purge in lines for people."""
    plan = done.plan
    if plan is None:
        by = f", by {', '.join(done.earlier)}" if done.earlier else ""
        yield f"nothing is left to purge: it was purged before{by}"
    else:
        yield f"purged {_size(plan)}: {plan.because}"
        yield from _plan_lines(plan)
    yield from _proof_lines(done.proof)
    if done.reports_removed:
        yield f"reports of rounds {done.reports_removed} could not be written anew and are gone"
    yield EXPORTS
    if plan is not None:
        yield f"record     purges/{plan.purge_id}.json"


def _size(plan: Plan) -> str:
    return (
        f"{plan.num_rows:,} input rows, {plan.num_images:,} images "
        f"({plan.num_bytes:,} bytes in {len(plan.shards)} shards)"
    )


def _plan_lines(plan: Plan) -> Iterator[str]:
    asked = ", ".join(plan.asked[:5])
    yield f"asked for  {asked}{f' and {len(plan.asked) - 5} more' if len(plan.asked) > 5 else ''}"
    for each in plan.unmatched:
        yield f"not found  {each}"
    yield f"rows       {', '.join(f'{table} {rows:,}' for table, rows in plan.tables.items())}"
    for name, rows in plan.training_sets.items():
        yield f"training   set {name[:8]}: {rows:,} rows"
    for model in plan.trained:
        yield (
            f"trained    {model.role} {model.model_id[:8]} of round {model.round}, on {model.images:,} of the images: its "
            "weights stay as they are, and SELECT * FROM lineage says so"
        )
    for model_id in plan.unknown:
        yield f"not known  whether {model_id[:8]} was trained on them: its training set is gone"
    if plan.reports:
        yield f"reports    written anew: rounds {', '.join(map(str, plan.reports))}"
    for name in plan.scratch:
        yield f"scratch    thrown away: {name}"
    for image_id, url in plan.look_alikes[:SHOWN]:
        yield f"stays      {image_id} looks the same and has other bytes: {url}"
    if len(plan.look_alikes) > SHOWN:
        yield "stays      and more that look the same: --json FILE lists some"


def _proof_lines(proof: Proof) -> Iterator[str]:
    texts = "" if proof.num_texts is None else f", {proof.num_texts:,} texts"
    yield f"proof      {proof.num_images:,} images, {proof.num_rows:,} input rows{texts} looked for"
    yield f"           {proof.places:,} byte ranges in {proof.shards} shards read back: zeros"
    for shard in proof.shards_gone:
        yield f"           shard {shard} is not there"
    for place in proof.in_place:
        yield f"yours      the lake never writes into your own tars; take out {place}"
    yield (
        f"           {proof.parts:,} parts of tables, {proof.training_sets} training sets and {proof.files} other files "
        "read: none names them"
    )


def data_of(done: Purged) -> dict[str, Any]:
    """A finished purge as plain data."""
    return {
        "purge": None if done.plan is None else _plan_data(done.plan),
        "earlier": list(done.earlier),
        "proof": asdict(done.proof),
        "clean": done.proof.is_clean,
        "reports_removed": list(done.reports_removed),
        "exports": EXPORTS,
    }


def _plan_data(plan: Plan) -> dict[str, Any]:
    return {
        name: value for name, value in asdict(plan).items() if name not in ("content", "planted")
    }


def _write_json(path: Path | None, data: dict[str, Any], rows: Any) -> None:
    """`data` as one object, with all images of `rows` in it, one a line."""
    from storage import ConfigError
    from storage.purge import images_of

    if path is None:
        return
    try:
        with path.open("w", encoding="utf-8") as f:
            f.write(json.dumps(data, indent=2).removesuffix("\n}") + ',\n  "images": [')
            for number, image in enumerate(images_of(rows)):
                f.write(f"{',' if number else ''}\n    {json.dumps(image)}")
            f.write("\n  ]\n}\n")
    except OSError as err:
        raise ConfigError(f"{path} cannot be written ({err}); name another file") from err


def _show(lines: Any) -> None:
    from flows.terminal import console

    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
