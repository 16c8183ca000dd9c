"""The sections of the settings: one frozen pydantic model for each stage.

Every field's docstring is what Prefect's form, `bootstrap settings` and the error messages show.
Units are in the names; `None` means "off" or "as the stage decides", 0 is a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def _hide_defaults(schema: dict[str, Any]) -> None:
    """Keep defaults out of the JSON schema.

    A form that pre-fills them sends them back as if the user had chosen them, and they would then
    win over the preset they were meant to be merged into.
    """
    for field in schema.get("properties", {}).values():
        if "default" in field:
            shown = field.pop("default")
            if shown is not None and not isinstance(shown, dict | list):
                field["description"] = f"{field.get('description', '')} (default {shown})".strip()


InferenceType = Literal["float32", "bfloat16", "float16"]
Decoding = Literal["nucleus", "greedy", "beam", "official"]
BatchSetting = Annotated[int, Field(ge=1)] | Literal["auto"]


class Section(BaseModel):
    """Frozen, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra=_hide_defaults,
    )


class MachineSettings(Section):
    """Where and on what the run happens; never part of a fingerprint."""

    lake: str = "lakes/bootstrap"
    """Root of the lake: a folder or any fsspec URI."""
    scratch: str | None = None
    """Local folder for downloads and training checkpoints; inside a local lake when not given."""
    device: str = "auto"
    """Torch device: auto, cpu, cuda or cuda:N."""
    num_threads: int | None = Field(default=None, ge=1)
    """Torch threads; all cores when not given."""
    decode_workers: int = Field(default=2, ge=1)
    """Threads or processes that decode images ahead of the model."""
    decode_in: Literal["auto", "threads", "processes"] = "auto"
    """What they are when captioning and scoring: processes where there is enough to decode, or always one of the two."""
    curate_processes: int = Field(default=1, ge=1)
    """Processes that caption and score, on GPUs one for each; a shard is worked on by one of them."""
    stop_grace_s: float = Field(default=20.0, ge=0)
    """After SIGTERM a shard is finished if that takes about this long at most, else given up."""
    compile: bool = False
    """Whether models that caption and score go through torch.compile: a minute at the start, for long runs on GPUs."""
    train_processes: int = Field(default=1, ge=1)
    """Processes that train one model together, on GPUs one for each; they share every batch."""
    train_sharding: Literal["none", "full"] = "none"
    """With several train_processes: `full` splits weights, gradients and optimizer state over them."""
    on_stale: Literal["error", "rebuild"] = "error"
    """What to do with a part whose fingerprint differs: stop with the reason, or rebuild it."""


class WorldSettings(Section):
    """A drawn world whose truth is known, served over loopback (the quickstart's web)."""

    folder: str = "world"
    """Folder that the world is drawn into."""
    num_web: int = Field(default=6000, ge=10)
    """Web pictures."""
    num_human: int = Field(default=400, ge=4)
    """Pictures with human captions."""
    num_heldout: int = Field(default=500, ge=4)
    """Held-out pictures with human captions."""
    human_captions: int = Field(default=5, ge=1, le=6)
    """Captions of each human-captioned picture."""
    noise_share: float = Field(default=0.4, ge=0.0, le=0.625)
    """Share of the web's alt texts that do not describe their picture."""
    fault_share: float = Field(default=0.02, ge=0.0, le=0.5)
    """URLs that fail in one way or another, as a share of the pictures."""
    image_size_px: int = Field(default=64, ge=16)
    """Side of the square pictures; a multiple of 8."""
    num_colors: int = Field(default=9, ge=4, le=10)
    """Colours in the world."""
    num_shapes: int = Field(default=8, ge=2, le=10)
    """Shapes in the world."""
    num_things: int = Field(default=1, ge=1, le=2)
    """Shapes in a picture."""
    patterned: bool = False
    """Whether grounds may have patterns, which captions then name."""
    slow_seconds: float = Field(default=6.0, gt=0)
    """How long the slow URLs wait before they answer."""
    seed: int = 0
    """Seed of the drawing."""


class ModelSettings(Section):
    """The mixture of encoder and decoder that is trained."""

    preset: Literal["nano", "tiny", "small", "small_dinov2", "base", "large"] = "base"
    """Size of the model; base and large are the paper's."""
    image_size_px: int | None = Field(default=None, ge=16)
    """Side of the input image; the preset's own when not given."""
    finetune_image_size_px: int | None = Field(default=None, ge=16)
    """Side for captioner and filter; as in pretraining when not given (the paper raises it to 384)."""
    tokenizer: str = "train"
    """`train` learns WordPieces from the run's own texts; else a BERT tokenizer's name or folder."""
    vocab_size: int = Field(default=30522, ge=16)
    """Largest vocabulary that `tokenizer: train` may learn, special tokens included."""
    init_vision: str | None = None
    """timm ViT weights to start from: a safetensors file, or the name of a pretrained timm model."""
    init_text: str | None = None
    """Hugging Face BERT folder to start from."""
    text_depth: int | None = Field(default=None, ge=1)
    """Layers of the text transformer; the preset's own when not given."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Of the text transformer; the preset's own when not given (0.1 in the paper)."""
    pixel_stats: Literal["clip", "imagenet"] = "clip"
    """Mean and standard deviation of the pixels, as the starting vision weights expect them."""


class CaptionSettings(Section):
    """How the captioner writes (paper, section 3.3: nucleus sampling, p = 0.9)."""

    decoding: Decoding = "nucleus"
    """Decoding method; official samples as BLIP's released code does, which counts the prompt in min and max_new_tokens."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = Field(default=0, ge=0)
    """Largest number of candidate tokens; 0 means no limit."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens already written; 1 leaves them (the released code used 1.1)."""
    num_beams: int = Field(default=3, ge=1)
    """Beams, when decoding is beam."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's log-probability is divided by; more favours long captions."""
    min_new_tokens: int = Field(default=1, ge=0)
    """Fewest tokens of a caption."""
    max_new_tokens: int = Field(default=20, ge=1)
    """Most tokens of a caption, prompt excluded."""
    prompt: str = ""
    """Text that every caption continues; it is not part of the result."""
    num_captions: int = Field(default=1, ge=1)
    """Captions written for each image."""
    batch_size: BatchSetting = 64
    """Images in a batch; `auto` measures what is fastest."""
    captioner: str = Field(default="own", pattern=r"^(own$|hf:.|blip:.|python:.)")
    """`own` is finetuned here; blip:PATH is a BLIP trained elsewhere, hf:PATH any image-to-text model of
    transformers; PATH is a folder or a hub name, for blip also a .pth. python:FILE.py:FUNCTION makes one of
    your own."""
    captioner_image_size_px: int | None = Field(default=None, ge=16)
    """Side that pictures get for a captioner of transformers; as its processor has it when not given."""
    dtype: InferenceType = "float32"
    """Number type of the model."""


class ScoreSettings(Section):
    """How the filter scores texts against images."""

    max_text_tokens: int = Field(default=35, ge=4)
    """Longest text in tokens, special tokens included."""
    batch_size: BatchSetting = 64
    """Images in a batch; `auto` measures what is fastest."""
    scorer: str = Field(default="own", pattern=r"^(own$|clip:.|open_clip:.|blip:.)")
    """`own` is the filter finetuned here, blip:PATH one trained elsewhere; clip:PATH and open_clip:PATH give
    itc_sim and no itm_prob."""
    dtype: InferenceType = "float32"
    """Number type of the model."""


class CurateSettings(Section):
    """How captioning and scoring go over the images; never part of a fingerprint."""

    fused: bool = False
    """Both in one pass, an image decoded once for both models; else all captions, then all scores."""


class DecideSettings(Section):
    """Which texts are kept."""

    policy: str = "blip"
    """Name of a policy in storage/policies, or the path of a .sql file."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """Its parameter `threshold`, such as the least itm_prob of a kept text; the policy's own default when not given
    (blip: 0.5, the ITM head's own verdict, as in the paper)."""
    params: dict[str, float | int | str] = {}
    """Its other parameters by name; `bootstrap policies` lists them with their ranges."""
    time_limit_s: float = Field(default=3600.0, gt=0)
    """Longest that the policy may take over all texts."""

    @property
    def given_params(self) -> dict[str, float | int | str]:
        """The parameters that are given, the threshold among them."""
        return (
            self.params if self.threshold is None else {**self.params, "threshold": self.threshold}
        )


class EvaluateSettings(Section):
    """What is measured on the held-out pairs."""

    rerank_k: int = Field(default=16, ge=0)
    """Candidates that ITM re-ranks for each query; 0 ranks by ITC alone (paper: 256 on COCO)."""
    finetuned: bool = False
    """Measure the round's captioner and filter too, each at its own task; the gate ignores them."""
    max_images: int | None = Field(default=None, ge=2)
    """Use only the first images of the held-out set, in order of image_id."""
    batch_size: int = Field(default=64, ge=1)
    """Images in a batch."""
    decoding: Literal["nucleus", "greedy", "beam"] = "beam"
    """Decoding for the caption metrics (paper: beam search with 3 beams)."""
    num_beams: int = Field(default=3, ge=1)
    """Beams, when decoding is beam."""
    max_new_tokens: int = Field(default=20, ge=1)
    """Most tokens of an evaluated caption."""


class ReportSettings(Section):
    """The static page of a round."""

    gallery_pairs: int = Field(default=12, ge=0)
    """Pairs shown in each group of the gallery."""
