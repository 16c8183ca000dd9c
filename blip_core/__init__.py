"""The models of the bootstrap cycle: tensors in, tensors out.

Importing this package imports nothing heavy: names are resolved when they are first used. It installs one
finder that lets torchvision (which timm needs) import beside a CPU build of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from blip_core import _torchvision

if TYPE_CHECKING:
    from blip_core.bert import init_from_bert as init_from_bert
    from blip_core.caption_evaluation import caption_metrics as caption_metrics
    from blip_core.captioner import GeneratedCaption as GeneratedCaption
    from blip_core.captioner import MEDCaptioner as MEDCaptioner
    from blip_core.checkpoints import LoadedModel as LoadedModel
    from blip_core.checkpoints import load_model as load_model
    from blip_core.checkpoints import save_model as save_model
    from blip_core.clip_scorer import CLIPScorer as CLIPScorer
    from blip_core.config import MEDConfig as MEDConfig
    from blip_core.config import TextConfig as TextConfig
    from blip_core.config import VisionConfig as VisionConfig
    from blip_core.diversity import caption_diversity as caption_diversity
    from blip_core.errors import BlipError as BlipError
    from blip_core.errors import CheckpointError as CheckpointError
    from blip_core.errors import ConfigError as ConfigError
    from blip_core.errors import CorruptCheckpoint as CorruptCheckpoint
    from blip_core.errors import DecodeError as DecodeError
    from blip_core.errors import TrainingError as TrainingError
    from blip_core.evaluation import RetrievalRanks as RetrievalRanks
    from blip_core.evaluation import evaluate_itm as evaluate_itm
    from blip_core.evaluation import evaluate_retrieval as evaluate_retrieval
    from blip_core.evaluation import mean_recall_gain as mean_recall_gain
    from blip_core.evaluation import rank_pairs as rank_pairs
    from blip_core.evaluation import recall_metrics as recall_metrics
    from blip_core.evaluation import retrieval_recalls as retrieval_recalls
    from blip_core.foreign import foreign_model_id as foreign_model_id
    from blip_core.foreign_captioner import ForeignCaptioner as ForeignCaptioner
    from blip_core.generation import CaptionConfig as CaptionConfig
    from blip_core.generation import Sequences as Sequences
    from blip_core.intervals import Metric as Metric
    from blip_core.intervals import average_precision as average_precision
    from blip_core.intervals import itm_auc as itm_auc
    from blip_core.med import MED as MED
    from blip_core.med import build_model as build_model
    from blip_core.objectives import Batch as Batch
    from blip_core.official import OfficialModel as OfficialModel
    from blip_core.official import load_official as load_official
    from blip_core.official import save_official as save_official
    from blip_core.open_clip_scorer import OpenCLIPScorer as OpenCLIPScorer
    from blip_core.pairs import EncodedPairs as EncodedPairs
    from blip_core.pairs import encode_pairs as encode_pairs
    from blip_core.protocols import Captioner as Captioner
    from blip_core.protocols import ImageTransform as ImageTransform
    from blip_core.protocols import Scorer as Scorer
    from blip_core.scorer import MEDScorer as MEDScorer
    from blip_core.scorer import PairScore as PairScore
    from blip_core.tokenizer import MEDTokenizer as MEDTokenizer
    from blip_core.tokenizer import TokenBatch as TokenBatch
    from blip_core.tokenizer import clean_caption as clean_caption
    from blip_core.train_config import TrainConfig as TrainConfig
    from blip_core.training import BatchSource as BatchSource
    from blip_core.training import TrainResult as TrainResult
    from blip_core.training import train as train
    from blip_core.transforms import EvalTransform as EvalTransform
    from blip_core.transforms import TrainTransform as TrainTransform
    from blip_core.transforms import decode_for as decode_for
    from blip_core.transforms import decode_image as decode_image
    from blip_core.transforms import picture_tensor as picture_tensor
    from blip_core.vision import load_timm_weights as load_timm_weights
    from blip_core.watch import TrainLog as TrainLog

_MODULES = {
    "bert": ("init_from_bert",),
    "caption_evaluation": ("caption_metrics",),
    "captioner": ("GeneratedCaption", "MEDCaptioner"),
    "checkpoints": ("LoadedModel", "load_model", "save_model"),
    "clip_scorer": ("CLIPScorer",),
    "config": ("MEDConfig", "TextConfig", "VisionConfig"),
    "errors": (
        "BlipError",
        "CheckpointError",
        "ConfigError",
        "CorruptCheckpoint",
        "DecodeError",
        "TrainingError",
    ),
    "diversity": ("caption_diversity",),
    "evaluation": (
        "RetrievalRanks",
        "evaluate_itm",
        "evaluate_retrieval",
        "mean_recall_gain",
        "rank_pairs",
        "recall_metrics",
        "retrieval_recalls",
    ),
    "foreign": ("foreign_model_id",),
    "foreign_captioner": ("ForeignCaptioner",),
    "generation": ("CaptionConfig", "Sequences"),
    "intervals": ("Metric", "average_precision", "itm_auc"),
    "med": ("MED", "build_model"),
    "objectives": ("Batch",),
    "official": ("OfficialModel", "load_official", "save_official"),
    "open_clip_scorer": ("OpenCLIPScorer",),
    "pairs": ("EncodedPairs", "encode_pairs"),
    "protocols": ("Captioner", "ImageTransform", "Scorer"),
    "scorer": ("MEDScorer", "PairScore"),
    "tokenizer": ("MEDTokenizer", "TokenBatch", "clean_caption"),
    "train_config": ("TrainConfig",),
    "training": ("BatchSource", "TrainResult", "train"),
    "transforms": (
        "EvalTransform",
        "TrainTransform",
        "decode_for",
        "decode_image",
        "picture_tensor",
    ),
    "vision": ("load_timm_weights",),
    "watch": ("TrainLog",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module of a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


_torchvision.install()
