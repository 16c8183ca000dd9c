"""The data set's card: README.md with front matter as Hugging Face's hub reads it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from storage.exports.facts import HELDOUT, Facts, Metric

HUB_LICENCES = {
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "apache-2.0", "mit", "pddl", "odbl",
}  # fmt: skip
"""Licences that the hub knows by name, and that data come under."""

USE = {
    "webdataset": """import glob
import webdataset as wds

tars = sorted(glob.glob("data/*.tar"))
for image, text, about in wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg;png;webp", "txt", "json"):
    ...""",
    "hf-parquet": """from datasets import load_dataset

rows = load_dataset(".", split="train")
rows[0]["image"], rows[0]["{caption}"]""",
    "blip-json": """import json

for entry in json.load(open("captions.json", encoding="utf-8")):
    entry["image"], entry["caption"]  # BLIP opens `image` relative to its image root, or to where it is started""",
    "coco-json": """from pycocotools.coco import COCO

coco = COCO("captions.json")
coco.loadAnns(coco.getAnnIds(coco.getImgIds()[:1]))""",
    "ids": """from datasets import load_dataset

rows = load_dataset(".", split="train")  # caption_id, image_id, url, source: no texts and no images""",
}


def card(facts: Facts) -> str:
    """The whole README.md."""
    body = [
        f"# {_cell(facts.title)}",
        _what(facts),
        "## What is in it",
        _contents(facts),
        "## How it was made",
        _made(facts),
        "## How good it is",
        _measured(facts),
        "## Licences",
        _licences(facts),
        "## Known limits",
        _limits(facts),
        "## Commands",
        _commands(facts),
    ]
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """What the hub reads: licence, size, tasks, and which files are rows."""
    front: dict[str, Any] = {
        "pretty_name": facts.title,
        "license": hub_licence(facts),
        "task_categories": ["image-to-text", "text-to-image", "zero-shot-image-classification"],
        "size_categories": [_size_category(facts.num_texts)],
        "tags": ["image-text-pairs", "blip", "capfilt", "croissant", facts.format],
    }
    path = {
        "webdataset": "data/*.tar",
        "hf-parquet": "data/*.parquet",
        "blip-json": "captions.json",
        "ids": f"data/*.{'csv' if facts.plan.csv else 'parquet'}",
    }.get(facts.format)
    if path:
        files = [{"split": "train", "path": path}]
        front["configs"] = [{"config_name": "default", "data_files": files}]
    return front


def hub_licence(facts: Facts) -> str:
    """A licence by the hub's name when all images state the same one that it knows; else other or unknown."""
    stated = [name for name, _, _ in facts.by_licence]
    if stated == [None]:
        return "unknown"
    name = (stated[0] or "").lower().replace(" ", "-")
    return name if len(stated) == 1 and name in HUB_LICENCES else "other"


def _what(facts: Facts) -> str:
    sources = {name: texts for name, _, texts in facts.by_source}
    parts = [f"{sources[s]:,} {_of(s)}" for s in ("web", "synthetic", "human") if s in sources]
    what = "Ids and addresses of image" if facts.format == "ids" else "Image"
    return (
        f"{what}-text pairs from the web, bootstrapped as in BLIP (CapFilt: Li et al. 2022, section 3.3): a captioner wrote "
        f"texts of its own for the images, a filter judged these and the texts that were found with them, and a policy "
        f"decided. {facts.config['num_texts']:,} texts of {facts.config['num_images']:,} images were kept: {', '.join(parts)}."
    )


def _of(source: str) -> str:
    return {
        "web": "texts as they were found (`web`)",
        "synthetic": "written by the captioner (`synthetic`)",
        "human": "written by people (`human`, not filtered)",
    }[source]


def _contents(facts: Facts) -> str:
    shape = {
        "webdataset": {
            "each": "Tars; a sample is a text with its image, so an image with two texts is there twice, far apart.",
            "list": "Tars; a sample is an image: `.txt` has its most trusted text, `.json` all.",
        },
        "hf-parquet": {
            "each": "Parquet; a row is a text with its image.",
            "list": "Parquet; a row is an image with the lists of its texts, the most trusted first.",
        },
        "blip-json": {
            "each": "`captions.json`, an entry a text, and `images/`.",
            "list": "`captions.json`, an entry an image with the list of its texts, and `images/`.",
        },
        "coco-json": {
            "each": "`captions.json` as COCO has it (images, annotations), and `images/`."
        },
        "ids": {"each": "A row a text: caption_id, image_id, url, source."},
    }[facts.format][facts.plan.captions]
    by_name = _table(
        ("source", "images", "texts"),
        [(_cell(n or "not stated"), i, t) for n, i, t in facts.by_source_name[:20]],
    )
    more = len(facts.by_source_name) - 20
    rest = f"\n\nand {more} smaller ones." if more > 0 else ""
    return (
        f"{shape} `image_id` is the first 32 hex digits of the sha256 of the image's bytes, `caption_id` the same of image, "
        f"source and text. `export.json` has the sha256 of every file; `croissant.json` describes them to programs.\n\n"
        f"```python\n{USE[facts.format].replace('{caption}', 'captions' if facts.plan.captions == 'list' else 'caption')}\n```\n\n"
        f"Where the images come from:\n\n{by_name}{rest}" + _lost(facts)
    )


def _lost(facts: Facts) -> str:
    if not facts.num_lost:
        return ""
    return (
        f"\n\n{facts.num_lost:,} images were kept but could not be read any more; they are not here, and "
        "`not_exported.jsonl` says which and why."
    )


def _made(facts: Facts) -> str:
    config = facts.config
    params = ", ".join(f"{k} = {json.dumps(v)}" for k, v in config["params"].items()) or "none"
    funnel: list[tuple[Any, ...]] = [(s, _cell(o), n) for s, o, n in facts.funnel]
    for source, kept, dropped in facts.decided:
        funnel += [("decided", f"{source}, kept", kept), ("decided", f"{source}, dropped", dropped)]
    funnel += [("exported", *row) for row in _exported(facts) if row[1]]
    models = _table(
        ("role", "model", "from", "trained on"),
        [
            (did, f"`{m[:12]}`", _cell(_origin(path, parent)), f"`{data[:12]}`" if data else "-")
            for did, m, path, parent, data in facts.models
        ],
    )
    return (
        f"Policy `{config['policy']}` (decision `{config['generation']}`, parameters: {params}) of round {config['round']}, "
        f"decided on {facts.decided_on}. Images were fetched from {facts.fetched[0]} to {facts.fetched[1]}.\n\n"
        + _table(("stage", "outcome", "rows"), funnel)
        + "\n\nImages that are held out for evaluation, pairs of known truth by which the filter is audited, and images whose "
        "address has opted out since are never exported, whatever was decided.\n\n" + models
    )


def _exported(facts: Facts) -> list[tuple[str, int]]:
    """What became of the kept texts."""
    kept = sum(n for _, n, _ in facts.decided)
    human = sum(texts for name, _, texts in facts.by_source if name == "human")
    selected = facts.config["num_texts"]
    return [
        ("withheld: reserved for measuring, or opted out since", kept + human - selected),
        ("image could not be read", selected - facts.num_texts),
        ("human", human),
        ("texts, all", facts.num_texts),
    ]


def _origin(path: str | None, parent: str | None) -> str:
    if path and ":" in path:
        return path
    return f"finetuned from {parent[:12]}" if parent else "-"


def _measured(facts: Facts) -> str:
    audit = [m for m in facts.metrics if m.dataset in ("canaries", "judge")]
    heldout = [m for m in facts.metrics if m.dataset == "heldout" and m.metric in HELDOUT]
    text = []
    if audit:
        followed = facts.active in (None, facts.config["generation"])
        under = "" if followed else f" under the decision `{facts.active}`, not this one"
        text += [
            f"The filter's errors, from planted pairs of known truth and a judge outside the loop{under}; `noise_left` is the "
            "estimated share of wrong texts among those kept, `noise_before` among all:",
            _metrics(audit),
            "These estimates assume that true and wrong texts score as the planted ones do. A captioner's own mistakes may fool the filter "
            "more often than those: for synthetic texts read `noise_left` as a lower bound.",
        ]
    else:
        text.append(
            "How many of the kept texts are wrong was not measured: this lake has no planted pairs of known truth."
        )
    if heldout:
        text += [
            "Models of the round on held-out pairs that people captioned:",
            _metrics(heldout),
        ]
    return "\n\n".join(text)


def _metrics(metrics: Sequence[Metric]) -> str:
    rows = []
    for m in metrics:
        between = "" if m.low is None or m.high is None else f"{m.low:.4f} to {m.high:.4f}"
        model = f"{m.role or 'model'} `{m.model_id[:12]}`" + (
            f", {m.protocol}" if m.protocol else ""
        )
        value = "-" if m.value is None else f"{m.value:.4f}"
        rows.append((m.dataset, m.metric, value, between, "-" if m.n is None else m.n, model))
    return _table(("on", "figure", "value", "95 % interval", "cases", "of"), rows)


def _licences(facts: Facts) -> str:
    rows = [
        (_cell(name) if name is not None else "not stated", images, texts)
        for name, images, texts in facts.by_licence
    ]
    return (
        "As the list of addresses states them; nobody has checked them. The images belong to their owners, and a licence "
        "of this collection cannot change that.\n\n" + _table(("licence", "images", "texts"), rows)
    )


def _limits(facts: Facts) -> str:
    limits = [
        "The filter errs: some kept texts are wrong, and true ones were dropped. It favours what the pairs it was finetuned on look "
        "like, and so does this set.",
        "Texts with the source `synthetic` were written by a model: they repeat its words and its mistakes. Who wants none filters by `source`.",
        "Nothing was done about persons, faces, violence or nudity; nothing about near duplicates: exact copies of an image are there once.",
        "Opt-outs were honoured as the servers sent them (`X-Robots-Tag`) when an image was fetched, and when its address was asked again; "
        "`robots.txt` was not read.",
        "`itm_prob` is the filter's own number and is comparable only among texts that the same filter judged.",
    ]
    if facts.format == "ids":
        limits.append("Addresses die and change: compare what you fetch with `image_id`.")
    return "\n".join(f"- {limit}" for limit in limits)


def _commands(facts: Facts) -> str:
    config, plan = facts.config, facts.plan
    words = [
        "bootstrap export --lake LAKE --to TARGET",
        f"--round {config['round']} --policy {config['generation']}",
        f"--format {facts.format} --captions {plan.captions}",
        f"--shard-images {config['shard_images']}",
    ]
    words += ["--with-human"] if config["with_human"] else []
    words += ["--csv"] if plan.csv else []
    words += [f"--name {json.dumps(config['name'])}"] if config["name"] else []
    return (
        "Written by blip-bootstrap:\n\n"
        f"```\n{' '.join(words)}\n```\n\n"
        "The same command again on this folder reads everything back and compares it with `export.json`."
    )


def _size_category(num: int) -> str:
    limits = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")]
    limits += [(10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B")]
    return next((name for limit, name in limits if num < limit), "n>1B")


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        shown = [f"{value:,}" if isinstance(value, int) else str(value) for value in row]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text from a list as one cell of Markdown."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
