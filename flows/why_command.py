"""`bootstrap why`: one image, text or address from its list to the models that were trained on it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def register(commands: Any, command: Any) -> None:
    """Add the command."""
    sub = command(commands, "why", "everything known of an image, a text or an address", _why)
    sub.add_argument(
        "asked", metavar="ID_OR_URL", help="image_id, caption_id, or an address as listed"
    )
    sub.add_argument("--lake", help="lake to read; else BOOTSTRAP_LAKE, else the last used here")
    sub.add_argument("--json", action="store_true", help="the same as JSON")


def _why(options: argparse.Namespace) -> int:
    from flows.cli import find_lake
    from flows.terminal import console
    from storage import Lake
    from storage.why import why

    lake = Lake.open(find_lake(options.lake), read_only=True)
    found = why(lake, options.asked)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2, default=str) + "\n")
        return 0
    for line in lines_of(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `storage.why.why` found, in lines for people."""
    lines = []
    for row in found["rows"]:
        lines.append(f"{row['pool']} row of {row['source_name']}: {row['url']}")
        if row["alt_text"] is not None:
            lines.append(f"  alt text  {row['alt_text']!r}")
        said = row["status"] if row["reason"] is None else f"{row['status']}, {row['reason']}"
        lines.append(
            f"  fetched   {said}; asked {row['attempts']} times, {row['fetched_at'] or 'no time noted'}"
        )
        if row["shard"]:
            lines.append(
                f"  stored    {row['shard']}.tar, {row['size']} bytes from {row['offset']}"
                + (f", {row['width']} x {row['height']} px" if row["width"] else "")
            )
        if row["licence"]:
            lines.append(f"  licence   {row['licence']}")
    if not found["images"]:
        lines.append("no image came of it, so there is no text to decide on")
    for image in found["images"]:
        lines += _image_lines(image)
    if found["images_not_shown"]:
        lines.append(f"and {found['images_not_shown']} more images; ask for one by its image_id")
    return lines


def _image_lines(image: dict[str, Any]) -> list[str]:
    lines = [f"image {image['image_id']}"]
    if image["held_back"]:
        lines.append(
            "  held back: models are measured or filters audited with it, and none is trained on it"
        )
    for purge in image["purged"]:
        models = ", ".join(model_id[:8] for model_id in purge["models"]) or "no model"
        lines.append(
            f"  purged    {purge['purged_at']} by {purge['purge_id']}; trained on it before: {models}"
        )
    for text in image["texts"]:
        lines.append(f"{text['source']} text {text['caption_id']}")
        lines.append(f"  says      {text['caption']!r}")
        if text["captioner_id"]:
            drawn = (
                f", top_p {text['top_p']:g}, seed {text['seed']}"
                if text["top_p"] is not None
                else ""
            )
            logprob = (
                f", mean log-probability {text['mean_logprob']:.3f}"
                if text["mean_logprob"] is not None
                else ""
            )
            lines.append(
                f"  written   by captioner {text['captioner_id'][:8]} of round {text['round']}{drawn}{logprob}"
            )
        if text["status"] != "ok":
            lines.append(f"  status    {text['status']}: neither scored nor decided on")
        for score in text["scores"]:
            numbers = ", ".join(
                f"{name} {score[name]:.4f}"
                for name in ("itm_prob", "itc_sim")
                if score[name] is not None
            )
            lines.append(
                f"  scored    round {score['round']} by {score['filter_id'][:8]}: {numbers or score['error']}"
            )
        for fate in text["decisions"]:
            kept = "kept" if fate["kept"] else "dropped"
            counts = "" if fate["counts"] else " (does not count)"
            lines.append(
                f"  {kept:<9} round {fate['round']} by {fate['generation']} {fate['params']}: {fate['reason']}{counts}"
            )
        lines += [
            f"  trained   {model['role']} {model['model_id'][:8]} of round {model['round']}: the row is in its "
            f"training set {model['trained_on'][:8]}"
            for model in text["trained"]
        ]
        if not text["trained"]:
            lines.append(
                f"  trained   no: it is in none of the training sets of {_known(image)} models"
            )
    lines += [
        f"  not known whether {model_id[:8]} was trained on it: the file of its training set is gone"
        for model_id in image["training_sets_gone"]
    ]
    return lines


def _known(image: dict[str, Any]) -> int:
    return int(image["models_looked_at"]) - len(image["training_sets_gone"])
