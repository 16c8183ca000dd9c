"""A lake to curate: drawn pictures in tars, web texts, and one random model as a captioner and as a filter."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from blip_core import MEDConfig, MEDTokenizer, build_model, save_model
from blip_core.config import BERT_VOCAB_SIZE
from flows.session import Run
from flows.settings import parse_settings
from storage import Lake, ModelRef, basis_of, caption_id, commit_part, image_id, registry
from storage.shards import Sample, write_shard

WORDS = 12
"""Tokens of a web text."""
CELLS = (64, 16, 4)


@dataclass(frozen=True)
class Bench:
    """The lake, the same models as folders of transformers, and the pictures' number."""

    lake: Lake
    captioner: ModelRef
    scorer: ModelRef
    captioner_folder: Path
    scorer_folder: Path
    num_images: int

    @property
    def tars(self) -> list[Path]:
        """The shards in order."""
        return sorted(Path(self.lake.uri).glob("shards/*.tar"))

    def run(self, settings: dict[str, object]) -> Run:
        """A run of round 1 on the lake."""
        return Run(self.lake, parse_settings({"preset": None, **settings}), 1)


def make(
    folder: Path, config: MEDConfig, *, images: int, shard_images: int, size: tuple[int, int]
) -> Bench:
    """Write everything into `folder`."""
    lake = Lake.open(str(folder / "lake"), create=True)
    for number, first in enumerate(range(0, images, shard_images)):
        _write_shard(
            lake, f"web-0001-00-{number:05d}", first, min(shard_images, images - first), size
        )
    tokenizer = made_up_tokenizer(folder / "vocabulary", config.text.vocab_size)
    model = build_model(config, seed=0)
    save_model(model, tokenizer, folder / "model")
    refs = [
        registry.register(
            lake, folder / "model", role=role, round=1, parent_id=None, trained_on=None, config={}
        )
        for role in ("captioner", "filter")
    ]
    for layout in ("hf-captioning", "hf-retrieval"):
        model.save_pretrained(folder / layout, layout, tokenizer=tokenizer)  # type: ignore[arg-type]
    return Bench(lake, *refs, folder / "hf-captioning", folder / "hf-retrieval", images)


def made_up_tokenizer(folder: Path, vocab_size: int) -> MEDTokenizer:
    """As many whole words as the model's vocabulary has room for, with BERT's special tokens where they lie."""
    folder.mkdir(parents=True)
    pieces = [f"w{number}" for number in range(vocab_size - 2)]
    first = 100 if vocab_size == BERT_VOCAB_SIZE else 1
    pieces[0] = "[PAD]"
    pieces[first : first + 4] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return MEDTokenizer.from_pretrained(folder)


def drawn(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of noise of many scales, which takes about as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for cell in CELLS:
        shape = (size[1] // cell + 2, size[0] // cell + 2, 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) * cell**0.5
    total = sum(cell**0.5 for cell in CELLS)
    file = io.BytesIO()
    Image.fromarray((picture / total).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def text_of(number: int, vocab_size: int) -> str:
    """The web text of a picture."""
    rng = np.random.default_rng((1, number))
    return " ".join(f"w{word}" for word in rng.integers(200, vocab_size - 2, WORDS))


def _write_shard(lake: Lake, name: str, first: int, count: int, size: tuple[int, int]) -> None:
    pictures = [drawn(size, first + place) for place in range(count)]
    texts = [text_of(first + place, 400) for place in range(count)]
    samples = [
        Sample(key=f"{first + i:032x}", image=data, ext="jpg", meta={"text": text})
        for i, (data, text) in enumerate(zip(pictures, texts, strict=True))
    ]
    _, ranges = write_shard(lake, name, samples)
    pairs, captions = [], []
    for place, (data, text, where) in enumerate(zip(pictures, texts, ranges, strict=True)):
        image = image_id(data)
        pairs.append(
            {"key": samples[place].key, "pool": "web", "row": first + place, "source_name": "drawn"}
            | {"alt_text": text, "status": "ok", "attempts": 1, "shard": name}
            | {"offset": where.offset, "size": where.size, "image_id": image}
        )
        captions.append(
            {"caption_id": caption_id(image, "web", text), "image_id": image, "source": "web"}
            | {"caption": text, "status": "ok", "round": 0}
        )
    basis = basis_of("benchmark", 1, {}, [])
    for table, rows, round_ in (("captions", captions, 0), ("pairs", pairs, None)):
        commit_part(lake, table, name, pa.Table.from_pylist(rows), round=round_, basis=basis)


def shallow(config: MEDConfig, depth: int) -> MEDConfig:
    """The same widths with few layers."""
    return replace(
        config,
        vision=replace(config.vision, depth=min(depth, config.vision.depth)),
        text=replace(config.text, depth=min(depth, config.text.depth)),
    )
