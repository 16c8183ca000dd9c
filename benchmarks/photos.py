"""The whole cycle on real photographs whose noise is known: what did filtering do, and did it pay?

A noisy "web" is made of captioned photographs: most get one of their own captions as alt text, a
stated share gets a wrong one (another photograph's caption, a line of real web text, or a caption
with one noun swapped). A few hundred keep their captions as the human set. Everything then runs as
it would for a user: a local HTTP server, img2dataset, the real flow, once for each seed.

    python benchmarks/photos.py --photos DIR --weights DIR [--text DIR] [--seeds 0 1 2] [--quick]

DIR of --photos holds images/ and captions.json ({image, split, captions}) and web_texts.txt; DIR of
--weights a timm ViT-S/14 file; DIR of --text, if given, a BERT folder of width 384 to start the text
from (see docs/results/photos.md).
"""

import argparse
import http.server
import json
import re
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NOISE_SHARE = 0.4
NUM_HUMAN = 300
KINDS = ("other_photo", "web_text", "noun_swap")
METRICS = (
    "mean_recall",
    "i2t_r1",
    "i2t_r5",
    "t2i_r1",
    "t2i_r5",
    "itm_auc_random",
    "itm_auc_hard",
    "cider",
    "bleu4",
    "rouge_l",
)
NOUNS = (
    "man",
    "woman",
    "boy",
    "girl",
    "dog",
    "child",
    "people",
    "ball",
    "water",
    "street",
    "beach",
    "snow",
    "grass",
    "bike",
    "horse",
    "car",
    "field",
    "mountain",
    "rock",
    "pool",
    "shirt",
    "hat",
)


def build_web(photos: Path, folder: Path, heldout_split: str, limit: int | None) -> None:
    """URL list, human and held-out captions and the truth about every pair, below `folder`."""
    rng = np.random.default_rng(7)
    records = json.loads((photos / "captions.json").read_text(encoding="utf-8"))
    train = [record for record in records if record["split"] == "train"]
    train = [train[i] for i in rng.permutation(len(train))]
    human, web = train[:NUM_HUMAN], train[NUM_HUMAN:]
    heldout = [record for record in records if record["split"] == heldout_split]
    if limit is not None:
        web, heldout = web[:limit], heldout[: max(32, limit // 4)]
    junk = [
        line.strip()
        for line in (photos / "web_texts.txt").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    rows = [_row(record, web, junk, rng) for record in web]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "truth.parquet")
    listed = pa.Table.from_pylist(rows).select(["url", "alt_text", "source_name"])
    pq.write_table(listed, folder / "urls.parquet")
    for name, chosen in (("human", human), ("heldout", heldout)):
        table = [
            {"image": record["image"], "caption": caption}
            for record in chosen
            for caption in record["captions"]
        ]
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")


def _row(record: dict, web: list[dict], junk: list[str], rng: np.random.Generator) -> dict:
    own = str(rng.choice(record["captions"]))
    kind, text = "", own
    if rng.random() < NOISE_SHARE:
        kind = str(rng.choice(KINDS))
        if kind == "other_photo":
            text = str(rng.choice(web[int(rng.integers(len(web)))]["captions"]))
        elif kind == "web_text":
            text = str(rng.choice(junk))
        else:
            text = swap_noun(own, rng)
            kind = kind if text != own else ""
    url = f"http://photos.test/{record['image']}"
    return {"url": url, "alt_text": text, "source_name": "web", "noise": kind}


def swap_noun(caption: str, rng: np.random.Generator) -> str:
    """The caption with one of the commonest nouns replaced by another; as it is without one."""
    places = [m for m in re.finditer(r"[a-z]+", caption.lower()) if m.group() in NOUNS]
    if not places:
        return caption
    place = places[int(rng.integers(len(places)))]
    others = [noun for noun in NOUNS if noun != place.group()]
    return caption[: place.start()] + str(rng.choice(others)) + caption[place.end() :]


class PhotoServer(http.server.ThreadingHTTPServer):
    """Serves DIR/images for http://photos.test/NAME, as a forward proxy on loopback."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, images: Path) -> None:
        self.images = images
        super().__init__(("127.0.0.1", 0), _PhotoHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Value for http_proxy."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _PhotoHandler(http.server.BaseHTTPRequestHandler):
    server: PhotoServer

    def do_GET(self) -> None:
        path = self.server.images / Path(urlsplit(self.path).path).name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def run_seed(options: argparse.Namespace, folder: Path, seed: int, proxy: str) -> dict[str, Any]:
    """One full cycle; returns its figures."""
    from flows.bootstrap import bootstrap
    from flows.settings import load_settings

    weights = next(options.weights.glob("*.safetensors"))
    images = str(options.photos / "images")
    changes: dict[str, Any] = {
        "seed": seed,
        "machine": {"lake": str(options.out / f"lake-{seed}"), "num_threads": options.threads},
        "ingest": {
            "http_proxy": proxy,
            "url_lists": [
                {"path": str(folder / "urls.parquet"), "source_name_column": "source_name"}
            ],
            "human": [{"captions": str(folder / "human.parquet"), "images": images}],
            "heldout": [
                {"captions": str(folder / "heldout.parquet"), "images": images, "name": "heldout"}
            ],
        },
        "model": {"init_vision": str(weights)},
    }
    if options.text is not None:
        changes["model"] |= {"init_text": str(options.text), "tokenizer": str(options.text)}
    started = time.time()
    settings = load_settings(options.preset, options.overrides, changes)
    result = bootstrap(settings)
    return measure(Path(settings.machine.lake), folder, result.round) | {
        "seed": seed,
        "minutes": (time.time() - started) / 60,
        "verdict": result.why,
    }


def measure(lake_path: Path, folder: Path, round: int) -> dict[str, Any]:
    """Filter against the truth, both arms' metrics, the funnel and examples."""
    from storage import Lake, query, registry

    lake = Lake.open(str(lake_path), read_only=True)
    truth = {
        row["url"]: row["noise"] for row in pq.read_table(folder / "truth.parquet").to_pylist()
    }
    rows = query(lake, f"SELECT * FROM verdicts WHERE round = {round}").to_pylist()
    web = [(truth[row["url"]], row["kept"]) for row in rows if row["source"] == "web"]
    arms = {
        name: registry.find(lake, "med", number) for name, number in (("raw", 0), ("clean", round))
    }
    measured = query(lake, "SELECT model_id, metric, value FROM metrics WHERE dataset = 'heldout'")
    values = {(row["model_id"], row["metric"]): row["value"] for row in measured.to_pylist()}
    return {
        "filter": filter_figures(web),
        "synthetic_kept": _share([row["kept"] for row in rows if row["source"] == "synthetic"]),
        "arms": {
            metric: {name: values.get((ref.model_id, metric)) for name, ref in arms.items() if ref}
            for metric in METRICS
        },
        "funnel": [
            (row["stage"], row["outcome"], row["rows"])
            for row in query(lake, f"SELECT * FROM funnel WHERE round = {round}").to_pylist()
        ],
        "examples": {
            name: [(row["source"], row["caption"], row["itm_prob"]) for row in _spread(rows, kept)]
            for name, kept in (("kept", True), ("dropped", False))
        },
    }


def filter_figures(web: list[tuple[str, bool]]) -> dict[str, Any]:
    """Precision and recall of dropping wrong web texts, and recall by kind of noise."""
    dropped = [noise for noise, kept in web if not kept]
    wrong = [kept for noise, kept in web if noise]
    return {
        "texts": len(web),
        "true_before": _share([not noise for noise, _ in web]),
        "true_after": _share([not noise for noise, kept in web if kept]),
        "drop_precision": _share([bool(noise) for noise in dropped]),
        "drop_recall": _share([not kept for kept in wrong]),
        "by_kind": {
            kind: _share([not kept for noise, kept in web if noise == kind]) for kind in KINDS
        },
        "kinds": dict(Counter(noise for noise, _ in web if noise)),
    }


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _spread(rows: list[dict], kept: bool) -> list[dict]:
    """Ten texts of one fate, evenly over the order of itm_prob: not the prettiest ones."""
    chosen = sorted(
        (row for row in rows if row["kept"] == kept), key=lambda row: row["itm_prob"] or 0
    )
    if len(chosen) <= 10:
        return chosen
    return [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, 10)]


def summary(results: list[dict[str, Any]]) -> str:
    """The figures as a markdown table: mean and spread over seeds."""
    lines = ["| held-out metric | raw | clean | gain, each seed |", "|---|---|---|---|"]
    for metric in METRICS:
        pairs = [result["arms"][metric] for result in results]
        if any(pair.get("raw") is None or pair.get("clean") is None for pair in pairs):
            continue
        raw, clean = ([pair[arm] for pair in pairs] for arm in ("raw", "clean"))
        gains = ", ".join(f"{b - a:+.3f}" for a, b in zip(raw, clean, strict=True))
        lines.append(f"| {metric} | {_mean(raw)} | {_mean(clean)} | {gains} |")
    lines += ["", "| filter, web texts | mean over seeds |", "|---|---|"]
    for name in ("true_before", "true_after", "drop_precision", "drop_recall"):
        lines.append(f"| {name} | {_mean([result['filter'][name] for result in results])} |")
    for kind in KINDS:
        shares = [result["filter"]["by_kind"][kind] for result in results]
        lines.append(f"| dropped of {kind} | {_mean(shares)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--text", type=Path, help="BERT folder of width 384; none: text from scratch"
    )
    parser.add_argument("--out", type=Path, default=Path("lakes/photos"))
    parser.add_argument("--preset", default="photos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heldout-split", choices=("dev", "test"), default="test")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--web", type=int, help="use only so many web photographs")
    parser.add_argument("--quick", action="store_true", help="200 photographs, a few steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        steps = [f"{stage}.steps=20" for stage in ("pretrain", "captioner", "filter")]
        options.overrides = [*steps, "pretrain.warmup_steps=2", *options.overrides]
    folder = options.out / "web"
    build_web(options.photos, folder, options.heldout_split, 200 if options.quick else options.web)
    server = PhotoServer(options.photos / "images")
    results = []
    for seed in options.seeds:
        results.append(run_seed(options, folder, seed, server.url))
        print(json.dumps(results[-1], indent=1, default=str), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    server.shutdown()
    print(summary(results))


if __name__ == "__main__":
    from flows.cli import quiet

    quiet(verbose=False)
    main()
