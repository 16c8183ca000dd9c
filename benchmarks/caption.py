"""Captioning against transformers' generate, on the same folder of random weights.

    python benchmarks/caption.py [--quick] [--json PATH] [--device cuda]

Theirs is BlipForConditionalGeneration as one would use it: batched, the same number type, all captions of an
image in one call (num_return_sequences, num_beams). Both must write the same number of new tokens. Before
anything is timed, both must write the same tokens greedily and by beams, in float32.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from side_by_side import (
    DTYPES,
    Call,
    Table,
    is_judged,
    measured_config,
    parser,
    peak_flops,
    prepare,
    target_here,
)
from torch import Tensor

from blip_core import MED, CaptionConfig, MEDConfig, build_model
from blip_core.beam import decode
from blip_core.decoder import MEDDecoder
from blip_core.generation import Vocabulary
from blip_core.packed import for_inference

# isort: split
# After blip_core, which lets transformers import beside a CPU build of torch.
from transformers import BlipForConditionalGeneration

TARGETS = {"vision": 2.0, "nucleus": 3.0, "beam3": 4.0, "five": 6.0}
"""Theirs over ours, on a CPU with AMX."""
PROMPT = 4
"""Tokens that every caption starts from, [DEC] included."""


@dataclass(frozen=True)
class Sides:
    """The same weights twice, with one batch of images and their embeddings."""

    ours: MED
    theirs: BlipForConditionalGeneration
    pixels: Tensor
    ours_embeds: Tensor
    theirs_embeds: Tensor
    num_new: int

    @classmethod
    def load(cls, folder: Path, dtype: str, options: argparse.Namespace) -> "Sides":
        """Load both from `folder` and encode the images."""
        number = DTYPES[dtype]
        ours = for_inference(MED.from_pretrained(folder), device=options.device, dtype=dtype)
        theirs = BlipForConditionalGeneration.from_pretrained(folder, dtype=number)
        theirs = theirs.to(options.device).eval()
        size = options.image_size
        pixels = torch.randn(options.batch_size, 3, size, size).to(options.device, number)
        return cls(
            ours,
            theirs,
            pixels,
            ours.encode_image(pixels),
            theirs.vision_model(pixels).last_hidden_state,
            options.num_new,
        )

    @property
    def prompt(self) -> list[int]:
        """[DEC] and three words."""
        return [self.ours.config.text.token_id("dec_id"), 1037, 3861, 1997]

    def config(self, decoding: str, num_captions: int = 1) -> CaptionConfig:
        """The same number of new tokens, whatever the model wants."""
        return CaptionConfig(
            decoding=decoding,
            num_captions=num_captions,
            max_new_tokens=self.num_new,
            min_new_tokens=self.num_new,
        )

    def decode_ours(self, config: CaptionConfig) -> list[list[int]]:
        """Decode from image embeddings."""
        decoder = MEDDecoder(
            self.ours,
            self.ours_embeds,
            per_image=config.num_beams if config.decoding == "beam" else config.num_captions,
            max_tokens=PROMPT + self.num_new,
        )
        vocabulary = Vocabulary(self.ours.config.text.token_id("sep_id"))
        names = [str(row) for row in range(len(self.ours_embeds))]
        device = self.ours.device
        return decode(decoder, self.prompt, names, config, vocabulary, device).ids

    def decode_theirs(self, **how: object) -> list[list[int]]:
        """Decode from image embeddings."""
        ids = torch.tensor([self.prompt] * len(self.pixels), device=self.pixels.device)
        found = self.theirs.text_decoder.generate(
            input_ids=ids,
            encoder_hidden_states=self.theirs_embeds,
            encoder_attention_mask=torch.ones(self.theirs_embeds.shape[:2], device=ids.device),
            eos_token_id=self.ours.config.text.token_id("sep_id"),
            pad_token_id=0,
            min_new_tokens=self.num_new,
            max_new_tokens=self.num_new,
            **how,
        )
        return found[:, PROMPT:].tolist()

    def five_ours(self) -> list[list[int]]:
        """Pixels to five captions an image."""
        return self.ours.generate(
            self.pixels, self.prompt, config=self.config("nucleus", num_captions=5)
        ).ids

    def five_theirs(self) -> Tensor:
        """Pixels to five captions an image."""
        # their generate() cuts the last token of what it is given, a [SEP] as a tokenizer puts it there
        ids = torch.tensor([[*self.prompt, 102]] * len(self.pixels), device=self.pixels.device)
        return self.theirs.generate(
            pixel_values=self.pixels,
            input_ids=ids,
            do_sample=True,
            top_p=0.9,
            top_k=0,
            num_return_sequences=5,
            min_new_tokens=self.num_new,
            max_new_tokens=self.num_new,
        )


def check_equal(sides: Sides) -> None:
    """SystemExit unless both write the same tokens."""
    for decoding, how in (("greedy", {"do_sample": False}), ("beam", {"num_beams": 3})):
        ours, theirs = sides.decode_ours(sides.config(decoding)), sides.decode_theirs(**how)
        if ours != theirs:
            raise SystemExit(f"not the same work: {decoding} gives {ours} here, {theirs} there")


def calls_of(sides: Sides) -> dict[str, dict[str, Call]]:
    """What is measured, each with its two sides."""
    sampled = {"do_sample": True, "top_p": 0.9, "top_k": 0}
    return {
        "vision": {
            "ours": lambda: sides.ours.encode_image(sides.pixels),
            "theirs": lambda: sides.theirs.vision_model(sides.pixels),
        },
        "nucleus": {
            "ours": lambda: sides.decode_ours(sides.config("nucleus")),
            "theirs": lambda: sides.decode_theirs(**sampled),
        },
        "beam3": {
            "ours": lambda: sides.decode_ours(sides.config("beam")),
            "theirs": lambda: sides.decode_theirs(num_beams=3, do_sample=False),
        },
        "five": {"ours": sides.five_ours, "theirs": sides.five_theirs},
    }


def vision_flops(config: MEDConfig) -> float:
    """Floating-point operations of the vision encoder for one image: its matrix products."""
    vision = config.vision
    tokens = (vision.image_size_px // vision.patch_size_px) ** 2 + 1
    weights = (4 + 2 * vision.mlp_ratio) * vision.width**2
    return vision.depth * (2 * tokens * weights + 4 * tokens**2 * vision.width)


@torch.inference_mode()
def main() -> None:
    """Write the folder, check, measure, print."""
    made = parser(__doc__ or "")
    made.add_argument("--num-new", type=int, help="new tokens; default 16, 6 with --quick")
    made.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options, rounds, counts = prepare(made)
    options.num_new = options.num_new or (6 if options.quick else 16)
    config = measured_config(options)
    table = Table(options.device)
    with tempfile.TemporaryDirectory() as folder:
        build_model(config, seed=0).save_pretrained(folder, "hf-captioning")
        check_equal(Sides.load(Path(folder), "float32", options))
        for dtype in options.dtype:
            sides = Sides.load(Path(folder), dtype, options)
            for count in counts:
                torch.set_num_threads(count)
                for name, calls in calls_of(sides).items():
                    if name not in options.only:
                        continue
                    target = target_here(TARGETS[name], options.device)
                    title = f"caption/{name}/{dtype}/{count} threads"
                    has_target = is_judged(options)
                    seconds = table.add(title, calls, rounds, target if has_target else None)
                    if name == "vision":
                        print_roofline(sides.ours.config, dtype, options, seconds)
    table.write(options.json)


def print_roofline(
    config: MEDConfig,
    dtype: str,
    options: argparse.Namespace,
    seconds: dict[str, dict[str, float]],
) -> None:
    """Print how near both are to what a large matrix product reaches: no ratio can exceed that."""
    clock = "wall" if options.device == "cuda" else "cpu"
    flops = vision_flops(config) * options.batch_size
    peak = peak_flops(DTYPES[dtype], options.device)
    shares = {name: flops / each[clock] / peak for name, each in seconds.items()}
    print(
        f"vision: {flops / options.batch_size / 1e9:.0f} GFLOP an image; a large product reaches "
        f"{peak / 1e9:.0f} GFLOP/s{'' if options.device == 'cuda' else ' per core'}; ours {shares['ours']:.0%} of that, theirs "
        f"{shares['theirs']:.0%}: at most {1 / shares['theirs']:.2f} x is possible"
    )


if __name__ == "__main__":
    main()
