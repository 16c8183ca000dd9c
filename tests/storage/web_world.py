"""Pictures, addresses and lists that the tests of the intake share."""

import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import UrlListConfig
from storage.lake import Lake
from storage.tables import PartRef


def jpeg(seed: int, side_px: int = 48) -> bytes:
    """A picture of noise: the same seed gives the same bytes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side_px, side_px, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def drawn(seed: int, side_px: int = 240) -> Image.Image:
    """A picture of soft patches: no two alike, with structure at every scale."""
    numbers = np.random.default_rng(seed)
    picture = Image.new("RGB", (side_px, side_px))
    for fields, share in ((4, 0.5), (9, 0.5), (30, 0.25)):
        patches = Image.fromarray(numbers.integers(0, 255, (fields, fields, 3), dtype=np.uint8))
        patches = patches.resize((side_px, side_px), Image.Resampling.BICUBIC)
        picture = Image.blend(picture, patches, share)
    return picture


def photo(seed: int) -> bytes:
    """A drawn picture as a JPEG."""
    data = io.BytesIO()
    drawn(seed).save(data, "JPEG", quality=90)
    return data.getvalue()


def copy_of(seed: int) -> bytes:
    """The same picture, smaller, cropped and compressed again."""
    data = io.BytesIO()
    drawn(seed).crop((5, 5, 235, 235)).resize((120, 120)).save(data, "JPEG", quality=60)
    return data.getvalue()


@dataclass
class PictureServer:
    """Answers as a forward proxy, so that addresses are the same in every run."""

    port: int = 0
    delay_s: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    released: threading.Event = field(default_factory=threading.Event)
    """Set once pictures whose names begin with `held` may be answered."""

    @property
    def proxy(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_requests(self) -> int:
        return sum(self.requests.values())


def answer(name: str) -> tuple[int, bytes, dict[str, str]]:
    plain: dict[str, str] = {}
    if name.startswith("ok"):
        return 200, jpeg(int(name[2:].split(".")[0])), plain
    if name.startswith("held"):
        return 200, jpeg(int(name[4:].split(".")[0])), plain
    if name.startswith("photo"):
        return 200, photo(int(name[5:].split(".")[0])), plain
    if name.startswith("copy"):
        return 200, copy_of(int(name[4:].split(".")[0])), plain
    answers = {
        "gone": (404, b"", plain),
        "robots": (404, b"", plain),
        "broken": (500, b"", plain),
        "page": (200, b"<html>not a picture</html>", plain),
        "truncated": (200, jpeg(1001)[:1200], plain),
        "noai": (200, jpeg(1002), {"X-Robots-Tag": "noai"}),
        "huge": (200, b"x" * 300_000, plain),
        "tiny": (200, jpeg(1003, side_px=4), plain),
        "slow": (200, jpeg(1004), plain),
    }
    return answers[name.split(".")[0]]


WEB_ROWS = [
    ("gone.jpg", "a dead link"),
    ("broken.jpg", "a server error"),
    ("page.jpg", "an html page"),
    ("truncated.jpg", "half a picture"),
    ("noai.jpg", "opted out"),
    ("huge.jpg", "too many bytes"),
    ("tiny.jpg", "too few pixels"),
    ("slow.jpg", "too slow"),
    ("ok1.jpg", "picture one"),
    ("ok1.jpg", "picture one, again"),
    ("ok1.jpg?copy", "the same picture elsewhere"),
    ("ok2.jpg", ""),
    *[(f"ok{i}.jpg", f"picture {i}") for i in range(3, 16)],
]


def write_list(path: Path, rows: list[tuple[str, str]], host: str = "pictures.test") -> Path:
    """A URL list as Parquet; a name without a scheme is one of the picture server."""
    urls = [name if ":" in name else f"http://{host}/{name}" for name, _ in rows]
    texts = [text for _, text in rows]
    table = pa.table({"url": urls, "alt_text": texts, "width_hint": list(range(len(rows)))})
    pq.write_table(table, path)
    return path


def download_config(server: PictureServer, **changes: object) -> DownloadConfig:
    given = {
        "http_proxy": server.proxy,
        "timeout_s": 2.0,
        "request_deadline_s": 10.0,
        "max_image_bytes": 200_000,
        "min_image_side_px": 8,
        "shard_rows": 10,
        "threads": 8,
        "robots": "ignore",
        "retry_passes": 0,
        "texts_per_image": 1,
    }
    return DownloadConfig(**given | changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WebLake:
    """A lake with one real intake, and what it was made from. Tests only read it."""

    lake: Lake
    url_list: UrlListConfig
    config: DownloadConfig
    parts: list[PartRef]
    progress: list[tuple[int, int]]
