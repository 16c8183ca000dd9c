"""Captioning and filtering as one writes it with transformers and a DataLoader: what `curate.py` compares with.

Batched, decoded and normalised by worker processes, the number type of the model, its own processor, Parquet at the
end. The filter's match probability alone is asked for, in one forward for the web texts of a batch and one for the
synthetic ones; ours gives the cosine too.
"""

import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

import blip_core

# isort: split
# After blip_core, which lets transformers import beside a CPU build of torch.
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor

assert blip_core


class TarImages(IterableDataset[dict[str, Any]]):
    """The pictures of some tars with their texts, in order; each worker process takes every n-th tar."""

    def __init__(self, tars: list[Path], processor: BlipProcessor, dtype: torch.dtype) -> None:
        self.tars, self.processor, self.dtype = tars, processor, dtype

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Picture by picture."""
        info = torch.utils.data.get_worker_info()
        own = self.tars if info is None else self.tars[info.id :: info.num_workers]
        for path in own:
            with tarfile.open(path) as tar:
                pixels = None
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    if member.name.endswith(".json"):
                        text = json.load(file)["text"]
                        yield {"tar": path.stem, "key": member.name, "pixels": pixels, "text": text}
                    else:
                        picture = Image.open(file).convert("RGB")
                        made = self.processor.image_processor(picture, return_tensors="pt")
                        pixels = made["pixel_values"][0].to(self.dtype)


@dataclass
class UserLoop:
    """Both models, loaded, and how they are used."""

    captioner: BlipForConditionalGeneration
    scorer: BlipForImageTextRetrieval
    processor: BlipProcessor
    batch_size: int
    num_new: int
    workers: int
    device: str
    dtype: torch.dtype
    waited_s: float = 0.0
    rows: int = 0
    captions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def load(cls, captioner: Path, scorer: Path, dtype: torch.dtype, **how: Any) -> "UserLoop":
        """Load both from folders of transformers."""
        device = how["device"]
        return cls(
            BlipForConditionalGeneration.from_pretrained(captioner, dtype=dtype).to(device).eval(),
            BlipForImageTextRetrieval.from_pretrained(scorer, dtype=dtype).to(device).eval(),
            BlipProcessor.from_pretrained(captioner),
            dtype=dtype,
            **how,
        )

    @torch.inference_mode()
    def run(self, tars: list[Path], out: Path) -> int:
        """Caption every picture, then score both texts of each; returns the rows written."""
        out.mkdir(parents=True, exist_ok=True)
        self.waited_s, self.rows = 0.0, 0
        written: dict[str, str] = {}
        for batch in self._batches(tars):
            texts = self._caption(batch["pixels"])
            written.update(zip(batch["key"], texts, strict=True))
        self._write(out / "captions", [{"key": k, "caption": t} for k, t in written.items()])
        scores: list[dict[str, Any]] = []
        for batch in self._batches(tars):
            for source, texts in (
                ("web", batch["text"]),
                ("synthetic", [written[key] for key in batch["key"]]),
            ):
                probabilities = self._score(batch["pixels"], texts)
                scores += [
                    {"key": key, "source": source, "itm_prob": probability}
                    for key, probability in zip(batch["key"], probabilities, strict=True)
                ]
        self._write(out / "scores", scores)
        return self.rows

    def _batches(self, tars: list[Path]) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            TarImages(tars, self.processor, self.dtype),
            batch_size=self.batch_size,
            num_workers=min(self.workers, len(tars)),
            pin_memory=self.device == "cuda",
        )
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - began
            if batch is None:
                return
            batch["pixels"] = batch["pixels"].to(self.device, non_blocking=True)
            yield batch

    def _caption(self, pixels: torch.Tensor) -> list[str]:
        ids = self.captioner.generate(
            pixel_values=pixels,
            do_sample=True,
            top_p=0.9,
            top_k=0,
            min_new_tokens=self.num_new,
            max_new_tokens=self.num_new,
        )
        return list(self.processor.batch_decode(ids, skip_special_tokens=True))

    def _score(self, pixels: torch.Tensor, texts: list[str]) -> list[float]:
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=35, return_tensors="pt"
        ).to(self.device)
        found = self.scorer(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
        )
        return list(found.itm_score.float().softmax(dim=-1)[:, 1].tolist())

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.rows += len(rows)
        pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
