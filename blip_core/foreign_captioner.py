"""Any image-to-text model of transformers as a captioner: BLIP-2, ViT-GPT2, Florence-2, a chat model that sees.

Dimension key: B batch, N rows (B times captions of an image), T generated tokens.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip_core.captioner import GeneratedCaption
from blip_core.config import require
from blip_core.errors import CheckpointError
from blip_core.foreign import (
    PICTURE_FILES,
    TOKENIZER_FILES,
    load_part,
    load_whole,
    read_config,
    refusals,
)
from blip_core.foreign_inputs import PictureInputs
from blip_core.generation import CaptionConfig, FinishReason, draw_key
from blip_core.packed import DTYPES, DType
from blip_core.protocols import ImageTransform
from blip_core.seeded_draw import PromptLength, SeededDraw

CHAT_PROMPT = "Describe this image in one short sentence."
"""What a chat model is asked when no prompt is given."""
TASK_PROMPTS = {"florence2": "<CAPTION>"}
"""Prompts of models that are asked by task, when none is given."""
_OWN_END = ("blip",)
"""Models whose own generate names the token that ends a caption."""


class ForeignCaptioner:
    """Captions from the `generate` of transformers, drawn per (seed, image_id, index).

    What a `CaptionConfig` does not name (forbidden n-grams, forced first tokens) stays as the model's own
    generation_config.json has it. The repetition penalty is transformers': it falls on the prompt's tokens too.
    """

    def __init__(
        self,
        path_or_repo: str | Path,
        config: CaptionConfig,
        device: torch.device | str = "cpu",
        dtype: DType = "float32",
        image_size_px: int | None = None,
    ) -> None:
        """Load a folder that save_pretrained wrote, or a model of the hub.

        `config.prompt` is what the model continues; a model with a chat template is asked it as a question, and
        Florence-2 takes it as a task. `image_size_px` is the side that pictures are resized to first;
        without it a model that takes any size gets 448 px, others what their processor makes.
        Raises CheckpointError when the folder holds no image-to-text model or lacks a part of it, ConfigError
        when its processor cannot be driven with this prompt, or decoding is `official`.
        """
        require(
            config.decoding != "official",
            f"decoding official is that of BLIP's released code, and {path_or_repo} is another model: use "
            "nucleus, greedy or beam",
        )
        self.where, self.config, self.device = str(path_or_repo), config, torch.device(device)
        values = read_config(path_or_repo)
        self.model_type = values["model_type"]
        _require_captions(self.model_type, values.get("architectures"), self.where)
        self.tokenizer, image_processor, process = _processing(self, path_or_repo)
        from transformers import AutoModelForImageTextToText

        self.dtype = DTYPES[dtype]
        model: Any = load_whole(AutoModelForImageTextToText, path_or_repo, self.dtype)
        self.model = model.to(self.device)
        self.inputs = PictureInputs(image_processor, process, self.where, image_size_px)
        self.transform: ImageTransform = self.inputs.transform
        self.eos_ids = _eos_ids(model, self.tokenizer, self.where)

    @torch.inference_mode()
    def caption(
        self, pixel_values: Tensor, image_ids: Sequence[str]
    ) -> list[list[GeneratedCaption]]:
        """B stacked tensors of `transform` and B ids -> `num_captions` captions of each image.

        A caption whose logits were not numbers has no text, a mean_logprob of NaN and the reason `nan`.
        """
        require(
            len(pixel_values) == len(image_ids),
            f"there are {len(pixel_values)} images, but {len(image_ids)} image_ids",
        )
        if not image_ids:
            return []
        inputs = self.inputs.batch(pixel_values, self.dtype, self.device)
        is_search = (
            self.config.decoding == "beam" and self.config.num_beams > 1
        )  # one beam is greedy
        found = self._searched(inputs) if is_search else self._chosen(inputs, image_ids)
        step = self.config.num_captions
        return [found[start : start + step] for start in range(0, len(found), step)]

    def _chosen(
        self, inputs: dict[str, Tensor], image_ids: Sequence[str]
    ) -> list[GeneratedCaption]:
        """Captions of greedy or nucleus decoding, an image's together."""
        config = self.config
        indices = range(config.num_captions)
        keys = None
        if config.is_sampled:
            every = [draw_key(config.seed, name, index) for name in image_ids for index in indices]
            keys = np.array(every, dtype=np.uint64)
        draw = SeededDraw(config, keys, self.eos_ids)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        if config.num_captions > 1:  # allowed to a sampler alone, which then draws among one token
            options |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            options["num_return_sequences"] = config.num_captions
        with _generators_kept(self.device):
            self._generate(inputs, draw, **options)
        return [self._drawn(*row) for row in zip(*draw.rows(), strict=True)]

    def _searched(self, inputs: dict[str, Tensor]) -> list[GeneratedCaption]:
        """The best caption of each image by beam search; scores are means a token, the end counted."""
        start = PromptLength()
        found = self._generate(
            inputs,
            start,
            do_sample=False,
            num_beams=self.config.num_beams,
            num_return_sequences=1,
            length_penalty=self.config.length_penalty,
            output_scores=True,
            return_dict_in_generate=True,
        )
        rows = found.sequences[:, start.num_tokens :].tolist()
        captions = []
        for row, score in zip(rows, found.sequences_scores.tolist(), strict=True):
            ids, reason = self._ended(row)
            length = len(ids) + (reason == "sep")
            mean = score * length**self.config.length_penalty / length
            captions.append(self._caption(ids, mean, reason))
        return captions

    def _generate(self, inputs: dict[str, Tensor], processor: Any, **options: Any) -> Any:
        from transformers import LogitsProcessorList

        config = self.config
        if self.model_type not in _OWN_END:
            options["eos_token_id"] = sorted(self.eos_ids)
            options["pad_token_id"] = self._pad_id()
        return self.model.generate(
            **inputs,
            **options,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            repetition_penalty=config.repetition_penalty,
            forced_eos_token_id=None,  # a caption that the limit cut is to say so
            logits_processor=LogitsProcessorList([processor]),
        )

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self.eos_ids)

    def _drawn(self, row: list[int], logprobs: list[float]) -> GeneratedCaption:
        ids, reason = self._ended(row)
        counted = logprobs[: len(ids) + (reason == "sep")]
        return self._caption(ids, sum(counted) / len(counted), reason)

    def _caption(
        self, ids: list[int], mean_logprob: float, reason: FinishReason
    ) -> GeneratedCaption:
        if not math.isfinite(mean_logprob):
            return GeneratedCaption("", 0, math.nan, "nan")
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return GeneratedCaption(text.strip(), len(ids), mean_logprob, reason)

    def _ended(self, row: list[int]) -> tuple[list[int], FinishReason]:
        """The tokens before the one that ends a caption, and why it ended."""
        for place, token in enumerate(row):
            if token in self.eos_ids:
                return row[:place], "sep"
        return row, "length"


def _require_captions(model_type: str, architectures: Any, where: str) -> None:
    """Raise CheckpointError for a model that writes no text about pictures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if model_type not in known:
        raise CheckpointError(
            f"{where} is a {model_type!r} model, which writes no text about pictures; a captioner is an "
            "image-to-text model such as blip, blip-2, florence2, qwen2_vl or vision-encoder-decoder"
        )
    expected = known[model_type]
    names = [str(name) for name in architectures or []]
    classes = expected if isinstance(expected, tuple | list) else (expected,)
    if names and not set(names) & set(classes):
        raise CheckpointError(
            f"{where} is a {names[0]}, not a {classes[0]}: it was trained for another task; give the "
            "captioning checkpoint of that model"
        )


def _processing(captioner: ForeignCaptioner, path_or_repo: str | Path) -> tuple[Any, Any, Any]:
    """Tokenizer, image processor, and the two as a function of a picture, with the prompt in it."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    prompt, where = captioner.config.prompt, captioner.where
    if captioner.model_type == "vision-encoder-decoder":
        image_processor = load_part(
            AutoImageProcessor.from_pretrained, path_or_repo, "the image processor", PICTURE_FILES
        )
        tokenizer = load_part(
            AutoTokenizer.from_pretrained, path_or_repo, "the tokenizer", TOKENIZER_FILES
        )
        start = _start_ids(path_or_repo, tokenizer, prompt)
        return tokenizer, image_processor, _Continued(image_processor, start)
    processor = load_part(
        AutoProcessor.from_pretrained, path_or_repo, "the processor", PICTURE_FILES, TOKENIZER_FILES
    )
    for name in ("image_processor", "tokenizer"):
        if getattr(processor, name, None) is None:
            raise CheckpointError(
                f"{where} has a {type(processor).__name__} where a processor of pictures and text is needed "
                f"(its {name} is missing): save AutoProcessor's beside the model with save_pretrained"
            )
    text = prompt or TASK_PROMPTS.get(captioner.model_type, "")
    if getattr(processor, "chat_template", None):
        text = _asked(processor, text or CHAT_PROMPT, where)
    return processor.tokenizer, processor.image_processor, _Prompted(processor, text)


def _asked(processor: Any, prompt: str, where: str) -> str:
    """The prompt as a user's turn with one picture, in the model's own template."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    with refusals(where, "the chat template"):
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    return text


def _start_ids(path_or_repo: str | Path, tokenizer: Any, prompt: str) -> list[int]:
    """The decoder's first token and the prompt's; empty without a prompt: the model knows its own start."""
    if not prompt:
        return []
    values = read_config(path_or_repo)
    start = values.get("decoder_start_token_id")
    start = tokenizer.bos_token_id if start is None else start
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids if start is None else [int(start), *ids]


class _Prompted:
    """A processor of transformers with one prompt."""

    def __init__(self, processor: Any, text: str) -> None:
        self.processor, self.text = processor, text

    def __call__(self, image: Image.Image) -> Mapping[str, Any]:
        text = {"text": [self.text]} if self.text else {}
        found: Mapping[str, Any] = self.processor(images=[image], **text, return_tensors="pt")
        return found


class _Continued:
    """An image processor, and the tokens that a separate decoder starts from."""

    def __init__(self, image_processor: Any, start_ids: list[int]) -> None:
        self.image_processor, self.start_ids = image_processor, start_ids

    def __call__(self, image: Image.Image) -> Mapping[str, Any]:
        found = dict(self.image_processor(images=image, return_tensors="pt"))
        if self.start_ids:
            found["decoder_input_ids"] = torch.tensor([self.start_ids])
        return found


def _eos_ids(model: Any, tokenizer: Any, where: str) -> frozenset[int]:
    """The tokens that end a caption. Raises CheckpointError when neither model nor tokenizer names one."""
    if model.config.model_type == "blip":
        return frozenset([int(model.config.text_config.sep_token_id)])
    writer = getattr(
        model, "language_model", None
    )  # BLIP-2 lets this generate, by its own settings
    configs = [getattr(writer, "generation_config", None), model.generation_config, tokenizer]
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(map(int, found if isinstance(found, list | tuple) else [found]))
    raise CheckpointError(
        f"{where} names no token that ends a caption: set eos_token_id in its generation_config.json"
    )


def _generators_kept(device: torch.device) -> Any:
    """Whatever transformers draws, the global generators are afterwards as before."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)
