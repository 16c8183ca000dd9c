"""What the rules for alt texts cost a text, what each meets, and what counting and remembering texts costs.

    python benchmarks/alt_texts.py --texts FILE [--english FILE] [--rows 10000000] [--images 1000000] [--json PATH]

`--texts` has one alt text a line: seconds of one core a text for each rule, and how many meet it. `--english` has texts that
are all English, one a line: how many the rule `language` takes for others. `--rows`: placeholders are counted on so many
made-up rows. `--images`: so many images with a text each are remembered, as an intake remembers those of its lake.
"""

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

from storage.intake.cleaning import Cleaner
from storage.intake.download_config import DownloadConfig
from storage.intake.plan import _find_placeholders
from storage.intake.stored import StoredImages
from storage.intake.text_rules import RULES, masked

PART_ROWS = 1000
MOST_ADDRESSES = 10


def us_of(work: Callable[[str], Any], texts: list[str]) -> float:
    """Microseconds of one core a text, the best of three."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for text in texts:
            work(text)
        best = min(best, time.process_time() - began)
    return round(1e6 * best / len(texts), 2)


def rules_on(texts: list[str]) -> list[dict[str, Any]]:
    """A line for each rule and each change."""
    lines = [
        {"rule": name, "us": us_of(met, texts), "meet it": sum(map(met, texts))}
        for name, met in RULES.items()
    ]
    english = Cleaner(DownloadConfig(languages=("en",)))
    refusals = [english.refusal(text, is_placeholder=False) for text in texts]
    lines.append(
        {
            "rule": "language, [en]",
            "us": us_of(lambda text: english.refusal(text, is_placeholder=False), texts),
            "meet it": sum(each is not None for each in refusals),
        }
    )
    repair = Cleaner(DownloadConfig(repair_texts=True)).cleaned
    for name, change in (("masked", masked), ("repaired", repair)):
        changed = sum(change(text) != text for text in texts)
        lines.append({"rule": name, "us": us_of(change, texts), "meet it": changed})
    return lines


def taken_for_others(texts: list[str]) -> dict[str, Any]:
    """English texts that the rule `language` leaves out."""
    cleaner = Cleaner(DownloadConfig(languages=("en",)))
    out = sum(cleaner.refusal(text, is_placeholder=False) is not None for text in texts)
    return {"english texts": len(texts), "taken for another language": out}


def placeholders_in(rows: int, scratch: Path) -> dict[str, Any]:
    """Placeholders counted on made-up rows, one in fifty with one of seven texts."""
    listed = scratch / "listed.parquet"
    settings = {"memory_limit": "2GB", "temp_directory": str(scratch / "spill")}
    with duckdb.connect(config=settings) as con:
        con.execute(
            "COPY (SELECT 'http://host' || i % 1000 || '.test/' || i || '.jpg' AS fetch_url, "
            "CASE WHEN i % 50 = 0 THEN 'photo by team ' || i % 7 ELSE 'words of caption number ' || i END AS alt_text, "
            "NULL::VARCHAR AS bad_text, NULL::VARCHAR AS bad_url "
            f"FROM range({rows}) t(i)) TO '{listed}' (FORMAT parquet)"
        )
        con.execute(f"CREATE TEMP VIEW listed AS FROM read_parquet('{listed}')")
        con.execute(
            "CREATE TEMP VIEW known AS SELECT alt_text, fetch_url AS url FROM listed WHERE false"
        )
        began = time.process_time()
        _find_placeholders(con, MOST_ADDRESSES)
        seconds = time.process_time() - began
        found = con.execute("SELECT count(*) FROM placeholders").fetchall()[0][0]
    return {"rows": rows, "placeholders": found, "core-seconds": round(seconds, 1), **_peak()}


def remembered(images: int, scratch: Path) -> dict[str, Any]:
    """Images with a text each put into `StoredImages`, part by part, and looked up."""
    began = time.process_time()
    with StoredImages(scratch) as stored:
        for first in range(0, images, PART_ROWS):
            rows, texts = [], {}
            for i in range(first, first + PART_ROWS):
                image_id = _hash("image", i)
                stored.first_key(image_id, _hash("key", i))
                where = {"shard": f"web-{first:010d}", "offset": i, "size": PART_ROWS}
                rows.append(
                    where | {"image_id": image_id, "key": _hash("key", i), "status": "ok", "row": i}
                )
                texts[image_id] = [_hash("text", i)]
            stored.add(rows, texts, own=True)
        seconds = time.process_time() - began
        size = sum(path.stat().st_size for path in scratch.rglob("*.sqlite"))
        some = [_hash("image", i) for i in range(0, images, max(1, images // 10_000))]
        look_up = us_of(lambda image_id: (stored.place(image_id), stored.texts(image_id)), some)
    return {
        "images": images,
        "us to remember one": round(1e6 * seconds / images, 1),
        "us to look one up": look_up,
        "bytes on disk": round(size / images),
        **_peak(),
    }


def _hash(kind: str, number: int) -> str:
    return hashlib.md5(f"{kind} {number}".encode()).hexdigest()


def _peak() -> dict[str, int]:
    return {"peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def _lines_of(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--english", type=Path)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="texts-") as name:
        # The one whose memory is of interest first.
        if options.images:
            lines.append(remembered(options.images, Path(name)))
        if options.texts:
            lines += rules_on(_lines_of(options.texts))
        if options.english:
            lines.append(taken_for_others(_lines_of(options.english)))
        if options.rows:
            lines.append(placeholders_in(options.rows, Path(name)))
    for line in lines:
        print(json.dumps(line), flush=True)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
