"""Scoring texts against images, against one forward of transformers for each pair, on the same random weights.

    python benchmarks/score.py [--quick] [--json PATH] [--device cuda]

Theirs is BlipForImageTextRetrieval as filters use it: pairs in a batch, each with its image (vision is computed
for every pair), texts padded to the batch's longest. `vision once` is the same with each image encoded once and
its embeddings repeated. Both are given [ENC] first. Theirs gives the match logits alone, ours the cosine as
well. Before anything is timed, both must give the same probabilities, in float32.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from our_step import WORDS
from side_by_side import (
    DTYPES,
    Call,
    Table,
    is_judged,
    measured_config,
    parser,
    prepare,
    target_here,
)
from torch import Tensor

from blip_core import MED, MEDScorer, MEDTokenizer, build_model

# isort: split
# After blip_core, which lets transformers import beside a CPU build of torch.
from transformers import BlipForImageTextRetrieval

TARGETS = {2: 3.7, 6: 9.0}
"""Theirs over ours by texts an image, on a CPU with AMX."""


@dataclass(frozen=True)
class Sides:
    """The same weights twice, with one batch of images and their texts."""

    ours: MEDScorer
    theirs: BlipForImageTextRetrieval
    pixels: Tensor
    texts: list[list[str]]

    @classmethod
    def load(cls, folder: Path, dtype: str, num_texts: int, options: argparse.Namespace) -> "Sides":
        """Load both from `folder`."""
        tokenizer = MEDTokenizer.train([" ".join(WORDS)] * 3, 400)
        ours = MEDScorer(
            MED.from_pretrained(folder),
            tokenizer,
            options.device,
            dtype=dtype,
            num_cached_texts=0,  # every call is of texts that were never seen
        )
        theirs = BlipForImageTextRetrieval.from_pretrained(folder, dtype=DTYPES[dtype])
        size = options.image_size
        pixels = torch.randn(options.batch_size, 3, size, size)
        return cls(
            ours,
            theirs.to(options.device).eval(),
            pixels.to(options.device, DTYPES[dtype]),
            make_texts(options.batch_size, num_texts),
        )

    def score(self) -> list[list[float]]:
        """Match probabilities by ours."""
        found = self.ours.score(self.pixels, self.texts)
        return [[score.itm_prob or 0.0 for score in scores] for scores in found]

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Ids with [ENC] first and mask (N, L) of all pairs, an image's together."""
        flat = [text for of_image in self.texts for text in of_image]
        tokens = self.ours.tokenizer.encode(flat, 35).to(self.pixels.device)
        return self.ours.tokenizer.encoder_ids(tokens.input_ids), tokens.attention_mask

    def pair_by_pair(self) -> Tensor:
        """Probabilities (N,): every pair with its own image."""
        ids, mask = self.tokens()
        pixels = self.pixels.repeat_interleave(len(self.texts[0]), dim=0)
        found = self.theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask)
        return found.itm_score.float().softmax(dim=-1)[:, 1]

    def vision_once(self) -> Tensor:
        """Probabilities (N,): the embeddings of an image repeated for its texts."""
        ids, mask = self.tokens()
        embeds = self.theirs.vision_model(self.pixels).last_hidden_state
        embeds = embeds.repeat_interleave(len(self.texts[0]), dim=0)
        hidden = self.theirs.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:2], device=ids.device),
        ).last_hidden_state
        return self.theirs.itm_head(hidden[:, 0]).float().softmax(dim=-1)[:, 1]


def make_texts(num_images: int, num_texts: int) -> list[list[str]]:
    """Captions of 5 to 16 words, all different."""
    generator = torch.Generator().manual_seed(num_texts)

    def one() -> str:
        length = int(torch.randint(5, 17, (), generator=generator))
        chosen = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[index] for index in chosen)

    return [[one() for _ in range(num_texts)] for _ in range(num_images)]


def check_equal(sides: Sides) -> None:
    """SystemExit unless all three give the same probabilities."""
    ours = torch.tensor([p for row in sides.score() for p in row])
    for name, theirs in (("pair", sides.pair_by_pair()), ("vision once", sides.vision_once())):
        off = float((ours - theirs.cpu()).abs().max())
        if not off < 1e-4:
            raise SystemExit(f"not the same work: probabilities differ by {off} ({name})")


@torch.inference_mode()
def main() -> None:
    """Write the folder, check, measure, print."""
    options, rounds, counts = prepare(parser(__doc__ or ""))
    config = measured_config(options)
    table = Table(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(config, seed=0).save_pretrained(folder, "hf-retrieval")
        check_equal(Sides.load(folder, "float32", 2, options))
        for dtype in options.dtype:
            for num_texts, target in TARGETS.items():
                sides = Sides.load(folder, dtype, num_texts, options)
                for count in counts:
                    torch.set_num_threads(count)
                    title = f"score/{num_texts} texts/{dtype}/{count} threads"
                    has_target = is_judged(options)
                    wanted = target_here(target, options.device) if has_target else None
                    pairs: dict[str, Call] = {"ours": sides.score, "theirs": sides.pair_by_pair}
                    table.add(title, pairs, rounds, wanted)
                    once: dict[str, Call] = {"ours": sides.score, "theirs": sides.vision_once}
                    table.add(f"{title}/vision once", once, rounds, None)
    table.write(options.json)


if __name__ == "__main__":
    main()
