"""What each check of the intake costs, by itself: CPU time of one thread for a picture.

    python benchmarks/intake_checks.py [--images 2000] [--known 100000] [--json PATH]

The pictures are those of `intake.py`. `--known` pictures are known before, so that looking among them has its price. What a
worker of img2dataset does for a request is measured against the real book of hosts, its process included.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from intake import pictures
from PIL import Image

from storage import ids
from storage.intake.alike import KnownLooks
from storage.intake.fetching.addresses import address_rules
from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.host_server import HostServer
from storage.intake.fetching.hosts import HostRules
from storage.intake.looks import SIDE, VIEWS, Looks, looks_of
from storage.intake.stored import StoredImages
from storage.intake.text_rules import checked_rules, rule_met
from storage.shards import add_member


def decoded(data: bytes) -> Image.Image:
    """As `inspect_image` does it."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * SIDE, 2 * SIDE))
    image.load()
    return image


def made_up_looks(number: int) -> Looks:
    """Looks of a picture that nobody has seen."""
    drawn = np.random.default_rng(number)
    hashes = drawn.integers(0, 2**63, (2, VIEWS), dtype=np.uint64)
    colours = drawn.integers(0, 255, (VIEWS, 12), dtype=np.uint8)
    return Looks(hashes[0], hashes[1], colours)


def checks(
    data: list[bytes], known: int, folder: Path
) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """Names, and what does the work for the picture of a number."""
    images = [decoded(each) for each in data]
    looks = [looks_of(each) for each in images]
    stored, alike = StoredImages(folder), KnownLooks(folder)
    for number in range(known):
        alike.add(ids.joined_id("known", str(number)), made_up_looks(number))
    every = checked_rules(["all"])
    rules = address_rules(())
    yield "decode", lambda n: decoded(data[n % len(data)])
    yield "looks", lambda n: looks_of(images[n % len(data)])
    yield "id", lambda n: ids.image_id(data[n % len(data)] + n.to_bytes(8, "big"))
    yield "the same bytes before", lambda n: stored.first_key(ids.joined_id(str(n)), "key")
    yield "shown by a held-out picture", lambda n: alike.find(looks[n % len(data)])
    yield "rules for texts", lambda n: rule_met(f"a picture of something, number {n}", every)
    yield "is the address public", lambda n: rules.check_literal("93.184.216.34")
    with tarfile.open(folder / "packed.tar", "w") as tar:
        f = tar.fileobj
        assert f is not None

        def pack(n: int) -> None:
            image = data[n % len(data)]
            add_member(tar, f, f"{n}.jpg", image)  # type: ignore[arg-type]
            add_member(tar, f, f"{n}.json", b"{}" * 60)  # type: ignore[arg-type]

        yield "into the shard", pack
    with HostServer(HostRules(agent="benchmark", honour_robots=False), patience_s=10) as hosts:
        client = HostClient(hosts.address)

        def turn(n: int) -> None:
            url = f"http://host{n % 50}.test/{n}.jpg"
            client.ask(url)
            client.done(url, None)

        yield "a turn at the host", turn


def main() -> None:
    """Print a line for each check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--known", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="write the lines there too")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="checks-") as folder:
        for name, work in checks(pictures(), options.known, Path(folder)):
            began = time.process_time()
            for number in range(options.images):
                work(number)
            us = 1e6 * (time.process_time() - began) / options.images
            lines.append({"check": name, "us a picture": round(us, 1)})
            print(json.dumps(lines[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
