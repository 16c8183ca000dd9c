"""Tiny models of transformers with random weights, each a folder as its authors would publish it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import blip_core  # noqa: F401 - first: with it, what transformers imports loads beside a CPU build of torch

# isort: split
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

TEXTS = ["a red circle on the left", "two green squares", "a blue ring, white ground", "it is 7"]
SIDE = 32
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(special: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2, OPT and Qwen have; `names` are special tokens by their role."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def prompt_of(processor: Any) -> dict[str, str]:
    """What a user puts beside the picture when asked for nothing in particular."""
    if getattr(processor, "chat_template", None):
        question = "Describe this image in one short sentence."
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return {"text": processor.apply_chat_template(turns, add_generation_prompt=True)}
    if isinstance(processor, Florence2Processor):
        return {"text": "<CAPTION>"}
    return {}


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """WordPieces of the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word.strip(",") for text in TEXTS for word in text.split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join([*special, *words, ",", "picture", "of"]) + "\n")
    return BertTokenizer(str(vocab))


def _square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def _saved(model: nn.Module, folder: Path, *parts: Any, scale: float = 4.0) -> Path:
    """Save with weights wide enough that captions of different images differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def _blip_config(tokenizer: BertTokenizer, **size: int) -> BlipConfig:
    ids = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    return BlipConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "initializer_range": 0.1, **ids, **size},
        vision_config={**VISION, "initializer_range": 0.1, **size},
        image_text_hidden_size=16,
    )


def blip(folder: Path, model_class: type = BlipForConditionalGeneration, **size: int) -> Path:
    tokenizer = bert_tokenizer(folder)
    torch.manual_seed(0)
    processor = BlipProcessor(BlipImageProcessor(size=_square()), tokenizer)
    return _saved(model_class(_blip_config(tokenizer, **size)), folder, processor)


def blip_retrieval(folder: Path) -> Path:
    """Heads of width 64, as in all that BLIP's authors released."""
    size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    return blip(folder, BlipForImageTextRetrieval, **size)


def blip2(folder: Path) -> Path:
    tokenizer = byte_tokenizer(
        ["<pad>", "</s>"], pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )
    processor = Blip2Processor(BlipImageProcessor(size=_square()), tokenizer, num_query_tokens=4)
    torch.manual_seed(0)
    opt = {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    qformer = {**TEXT, "encoder_hidden_size": 32, "vocab_size": 30}
    config = Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config=opt, num_query_tokens=4
    )
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    return _saved(Blip2ForConditionalGeneration(config), folder, processor)


def vit_gpt2(folder: Path) -> Path:
    tokenizer = byte_tokenizer(
        ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=0,
        add_cross_attention=True,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), gpt2)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 0, 0, 0
    model = VisionEncoderDecoderModel(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=0, eos_token_id=0, pad_token_id=0, bos_token_id=0
    )
    return _saved(model, folder, ViTImageProcessor(size=_square()), tokenizer)


def florence2(folder: Path) -> Path:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = byte_tokenizer(
        special,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(
        size=_square(64), crop_size=_square(64), do_center_crop=False, image_seq_length=5
    )
    torch.manual_seed(0)
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "window_size": 4,
        "projection_dim": 32,
    }
    text = {
        "model_type": "bart",
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=4)
    processor = Florence2Processor(images, tokenizer)
    return _saved(Florence2ForConditionalGeneration(config), folder, processor)


def qwen2_vl(folder: Path) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = byte_tokenizer(
        [*special, "<|image_pad|>", "<|video_pad|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad",)}
    torch.manual_seed(0)
    text = {
        **TEXT,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=ids["image_pad"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    model = Qwen2VLForConditionalGeneration(config)
    # as published: a model that samples by its own settings unless told otherwise
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, eos_token_id=[2, 0], pad_token_id=0
    )
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=sizes),
        tokenizer,
        Qwen2VLVideoProcessor(size=sizes),
        chat_template=CHAT_TEMPLATE,
    )
    return _saved(model, folder, processor)


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Ends a text with its own token, as CLIP's does: the features are read there."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]  # an end of id 2 is read as an old checkpoint's
    made = byte_tokenizer(special, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    made.model_max_length = 24
    return made


def clip(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(text_config={**text, **ids}, vision_config=VISION, projection_dim=16)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=_square())
    return _saved(CLIPModel(config), folder, CLIPProcessor(images, tokenizer))


def siglip(folder: Path) -> Path:
    tokenizer = byte_tokenizer(["<pad>", "</s>"], pad_token="<pad>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.model_max_length = 16
    torch.manual_seed(0)
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "projection_size": 32}
    config = SiglipConfig(text_config={**text, **ids}, vision_config=VISION)
    images = SiglipImageProcessor(size=_square())
    return _saved(SiglipModel(config), folder, SiglipProcessor(images, tokenizer))


CAPTIONERS: dict[str, Callable[[Path], Path]] = {
    "blip": blip,
    "blip2": blip2,
    "vit_gpt2": vit_gpt2,
    "florence2": florence2,
    "qwen2_vl": qwen2_vl,
}
SCORERS: dict[str, Callable[[Path], Path]] = {"clip": clip, "siglip": siglip}
