"""The quickstart's world: drawn pictures, a noisy URL list, human captions, and the truth about all.

Everything is a pure function of `WorldConfig`. The folder it makes:

    web/urls.parquet, web/images/     the URL list (url, alt_text, source_name) and what the URLs serve
    human/captions.json, images/      a few pictures that people captioned (COCO layout)
    heldout/captions.json, images/    the same for evaluation, never trained on
    truth.parquet                     what each picture shows and whether its alt text is true
    world.json                        the configuration, the mark that all of the above is whole
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.quickstart.drawing import GRID, draw_jpeg
from flows.quickstart.scenes import (
    COLORS,
    FORMS,
    PATTERNS,
    SHAPES,
    WEB_FORMS,
    Scene,
    Vocabulary,
    caption_is_true,
    describe,
    swap_one_word,
)

WORLD_VERSION = 2

# Each source's share of wrong texts, as a multiple of the whole list's share. Means to 1.
SOURCES = {"museum": 0.4, "blog": 1.0, "shop": 1.6}
NOISE_KINDS = {"other_picture": 0.4, "boilerplate": 0.3, "one_word": 0.3}
FAULTS = ("gone", "broken", "html", "truncated", "opted_out", "tiny", "slow", "duplicate")
BOILERPLATE = (
    "image for sale",
    "click to enlarge",
    "photo",
    "img {number}.jpg",
    "dsc{number}.jpg",
    "free shipping on all orders",
    "untitled",
    "buy now at the best price",
)
MAX_SLOW = 4  # each slow URL costs the download a full timeout

TRUTH_SCHEMA = pa.schema(
    [
        ("pool", pa.string()),  # web, human or heldout
        ("url", pa.string()),
        ("source_name", pa.string()),
        ("alt_text", pa.string()),
        ("alt_text_is_true", pa.bool_()),
        ("noise_kind", pa.string()),  # "" when the alt text is true
        ("fault", pa.string()),  # "" when the URL serves its picture
        ("scene", pa.string()),  # Scene.to_json
        ("image_file", pa.string()),  # relative to the world's folder
        ("image_id", pa.string()),  # first 32 hex digits of sha256 of the file
    ]
)


class WorldError(RuntimeError):
    """A folder that cannot be read as a world, or must not be overwritten by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """How large, how rich and how noisy the world is."""

    num_web: int = 6000
    """Pictures on the web; the URL list has `fault_share` more rows that give none."""
    num_human: int = 400
    num_heldout: int = 500
    human_captions: int = 5
    noise_share: float = 0.4
    """Share of alt texts that are wrong."""
    fault_share: float = 0.02
    image_size_px: int = 64
    num_colors: int = 9
    num_shapes: int = 8
    num_things: int = 1
    """1 or 2 kinds of shapes in a picture."""
    patterned: bool = False
    """Grounds may be striped or dotted."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("num_web", self.num_web, 10, 10_000_000)
        _check_range("num_human", self.num_human, 0, 1_000_000)
        _check_range("num_heldout", self.num_heldout, 0, 1_000_000)
        _check_range("human_captions", self.human_captions, 1, len(FORMS))
        _check_range("noise_share", self.noise_share, 0.0, 1 / max(SOURCES.values()))
        _check_range("fault_share", self.fault_share, 0.0, 0.5)
        _check_range("image_size_px", self.image_size_px, 32, 1024)
        _check_range("num_colors", self.num_colors, 4, len(COLORS))
        _check_range("num_shapes", self.num_shapes, 2, len(SHAPES))
        _check_range("num_things", self.num_things, 1, 2)
        if self.image_size_px % (2 * GRID):
            raise ValueError(f"image_size_px: {self.image_size_px} is not a multiple of {2 * GRID}")

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that this world's scenes use."""
        return Vocabulary(
            colors=tuple(COLORS)[: self.num_colors],
            shapes=SHAPES[: self.num_shapes],
            patterns=PATTERNS if self.patterned else PATTERNS[:1],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A world on disk."""

    folder: Path
    config: WorldConfig

    @property
    def url_list(self) -> Path:
        """Parquet with url, alt_text, source_name."""
        return self.folder / "web" / "urls.parquet"

    @property
    def human_captions(self) -> Path:
        """COCO captions JSON; its pictures lie in `human_images`."""
        return self.folder / "human" / "captions.json"

    @property
    def human_images(self) -> Path:
        """Folder of the human-captioned pictures."""
        return self.folder / "human" / "images"

    @property
    def heldout_captions(self) -> Path:
        """COCO captions JSON; its pictures lie in `heldout_images`."""
        return self.folder / "heldout" / "captions.json"

    @property
    def heldout_images(self) -> Path:
        """Folder of the held-out pictures."""
        return self.folder / "heldout" / "images"

    def truth(self) -> pa.Table:
        """The whole truth, one row per row of the URL list and per other picture."""
        return pq.read_table(self.folder / "truth.parquet", schema=TRUTH_SCHEMA)

    def scenes(self) -> dict[str, Scene]:
        """What each picture shows, by image_id (all three pools)."""
        table = self.truth().select(["image_id", "scene"])
        return {
            row["image_id"]: Scene.from_json(row["scene"])
            for row in table.to_pylist()
            if row["image_id"]
        }


def build_world(config: WorldConfig, folder: Path) -> World:
    """Draw the world into `folder`, or return the one already there if its configuration is equal.

    A world of another configuration is replaced. Raises WorldError when the folder holds anything else.
    """
    folder = Path(folder)
    mark = folder / "world.json"
    if mark.exists() and json.loads(mark.read_text()) == _mark(config):
        return World(folder=folder, config=config)
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise WorldError(f"{folder} holds other files and no world.json: name a new folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    truth = [*_write_web(config, partial), *_write_people(config, partial)]
    pq.write_table(pa.Table.from_pylist(truth, schema=TRUTH_SCHEMA), partial / "truth.parquet")
    (partial / "world.json").write_text(json.dumps(_mark(config), indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return World(folder=folder, config=config)


def load_world(folder: Path) -> World:
    """The world that `build_world` made in `folder`."""
    mark = Path(folder) / "world.json"
    if not mark.exists():
        raise WorldError(f"{folder} has no world.json: build it with build_world first")
    content = json.loads(mark.read_text())
    if content["version"] != WORLD_VERSION:
        raise WorldError(
            f"{mark} has version {content['version']}, not {WORLD_VERSION}: rebuild it"
        )
    return World(folder=Path(folder), config=WorldConfig(**content["config"]))


def _mark(config: WorldConfig) -> dict[str, Any]:
    return {"version": WORLD_VERSION, "config": asdict(config)}


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not in [{low:g}, {high:g}]")


def _draw(config: WorldConfig, pool: int, index: int, scene: Scene, path: Path) -> str:
    """Draw one picture to `path`; returns its image_id."""
    rng = np.random.default_rng([config.seed, 1, pool, index])
    data = draw_jpeg(scene, config.image_size_px, rng)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()[:32]


def _write_web(config: WorldConfig, folder: Path) -> list[dict[str, Any]]:
    """Pictures, alt texts and faults of the URL list; returns the truth rows in list order."""
    (folder / "web" / "images").mkdir(parents=True)
    rows = []
    for number, row in enumerate(_web_rows(config)):
        row["pool"] = "web"
        row["url"] = f"http://{row['source_name']}.shapes.test/{number:05d}.jpg"
        row["image_file"] = f"web/images/{number:05d}.jpg"
        scene = Scene.from_json(row["scene"])
        row["image_id"] = _draw(config, 0, number, scene, folder / row["image_file"])
        rows.append(row)
    _add_duplicates(config, rows)
    columns = ["url", "alt_text", "source_name"]
    listed = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows])
    pq.write_table(listed, folder / "web" / "urls.parquet")
    return rows


def _web_rows(config: WorldConfig) -> Iterator[dict[str, Any]]:
    """Scene, source, alt text and fault of every row but the duplicates, in list order."""
    rng = np.random.default_rng([config.seed, 0, 0])
    vocabulary = config.vocabulary
    faults = _faults(config)
    total = config.num_web + len(faults)
    scenes = [vocabulary.draw(rng, config.num_things) for _ in range(total)]
    sources = rng.permutation(np.resize(list(SOURCES), total))
    kinds = _noise_kinds(config, sources, rng)
    fault_rows = dict(zip(rng.permutation(total).tolist(), faults, strict=False))
    for i, scene in enumerate(scenes):
        alt_text = _alt_text(scene, str(kinds[i]), vocabulary, rng)
        yield {
            "source_name": str(sources[i]),
            "alt_text": alt_text,
            "alt_text_is_true": caption_is_true(alt_text, scene),
            "noise_kind": str(kinds[i]),
            "fault": fault_rows.get(i, ""),
            "scene": scene.to_json(),
        }


def _faults(config: WorldConfig) -> list[str]:
    """The fault of each row that has one (duplicates aside): every kind the same number of times."""
    each = _num_each_fault(config)
    return [
        fault
        for fault in FAULTS
        if fault != "duplicate"
        for _ in range(min(each, MAX_SLOW) if fault == "slow" else each)
    ]


def _num_each_fault(config: WorldConfig) -> int:
    if config.fault_share == 0:
        return 0
    return max(1, round(config.num_web * config.fault_share / len(FAULTS)))


def _add_duplicates(config: WorldConfig, rows: list[dict[str, Any]]) -> None:
    """Repeat some good rows further down the list, URL and text as they are."""
    rng = np.random.default_rng([config.seed, 0, 1])
    good = [row for row in rows if not row["fault"]]
    for pick in rng.permutation(len(good))[: _num_each_fault(config)]:
        original = good[pick]
        place = int(rng.integers(rows.index(original) + 1, len(rows) + 1))
        rows.insert(place, {**original, "fault": "duplicate"})


def _noise_kinds(config: WorldConfig, sources: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The noise kind of each row, "" for true texts: every source gets exactly its share."""
    kinds = np.full(len(sources), "", dtype="<U16")
    for source, factor in SOURCES.items():
        rows = rng.permutation(np.flatnonzero(sources == source))
        wrong = rows[: round(len(rows) * config.noise_share * factor)]
        kinds[wrong] = rng.choice(list(NOISE_KINDS), size=len(wrong), p=list(NOISE_KINDS.values()))
    return kinds


def _alt_text(scene: Scene, kind: str, vocabulary: Vocabulary, rng: np.random.Generator) -> str:
    """What a web page says about the picture; wrong in the way that `kind` names."""
    form = int(rng.integers(WEB_FORMS))
    if kind == "boilerplate":
        phrase = BOILERPLATE[int(rng.integers(len(BOILERPLATE)))]
        return phrase.format(number=f"{int(rng.integers(10_000)):04d}")
    said = scene
    if kind == "one_word":
        said = swap_one_word(scene, vocabulary, rng)
    while kind == "other_picture" and said == scene:
        said = vocabulary.draw(rng, len(scene.things))
    return describe(said, form)


def _write_people(config: WorldConfig, folder: Path) -> list[dict[str, Any]]:
    """Human-captioned and held-out pictures with their COCO files; returns their truth rows."""
    truth = []
    for pool, (name, count) in enumerate(
        (("human", config.num_human), ("heldout", config.num_heldout)), start=1
    ):
        (folder / name / "images").mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, (scene, forms) in enumerate(_people_scenes(config, pool, count)):
            file = f"{index:05d}.jpg"
            image_id = _draw(config, pool, index, scene, folder / name / "images" / file)
            images.append({"id": index + 1, "file_name": file})
            for form in forms:
                caption = {"image_id": index + 1, "caption": describe(scene, form)}
                annotations.append({"id": len(annotations) + 1, **caption})
            row = {"pool": name, "scene": scene.to_json(), "noise_kind": "", "fault": ""}
            truth.append({**row, "image_file": f"{name}/images/{file}", "image_id": image_id})
        content = {"images": images, "annotations": annotations}
        (folder / name / "captions.json").write_text(json.dumps(content))
    return truth


def _people_scenes(config: WorldConfig, pool: int, count: int) -> Iterator[tuple[Scene, list[int]]]:
    """Scenes with the forms of their captions; none repeats until every possible scene was used."""
    rng = np.random.default_rng([config.seed, 0, 1 + pool])
    possible = config.vocabulary.scenes(config.num_things)
    used: set[Scene] = set()
    for _ in range(count):
        scene = config.vocabulary.draw(rng, config.num_things)
        while scene in used:
            scene = config.vocabulary.draw(rng, config.num_things)
        used.add(scene)
        if len(used) >= possible:
            used.clear()
        yield scene, rng.permutation(len(FORMS))[: config.human_captions].tolist()
