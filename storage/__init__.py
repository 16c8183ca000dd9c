"""The lake: bytes, tables and names of an image-text bootstrapping run.

Nothing here knows of torch or of Prefect. Start with `lake.Lake`, then `tables` (how a part is
committed), `intake` (how pairs come in) and `catalog` (how they are read with SQL).
"""

from storage import by_hand, layout, registry, rounds
from storage.carry import carried_model, carried_part
from storage.catalog import connect, query, write_catalog
from storage.errors import (
    ConfigError,
    CorruptData,
    CorruptPart,
    CorruptShard,
    EmptyInput,
    EmptyTrainSet,
    LakeBusy,
    LakeNotFound,
    QueryRefused,
    SchemaVersionError,
    SettingsChanged,
    StaleOutput,
    StorageError,
    TransientError,
)
from storage.fingerprint import basis_of, fingerprint, fingerprint_of
from storage.ids import caption_id, image_id
from storage.intake.adopting.adopt import adopt_images
from storage.intake.adopting.image_set import ImageSetConfig
from storage.intake.download_config import DownloadConfig
from storage.intake.human import CaptionSetConfig, ingest_captions
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls
from storage.lake import Lake
from storage.policy import decide, decide_variant
from storage.registry import ModelRef, local_folder
from storage.shards import ShardRef, iter_shard, read_image
from storage.tables import (
    Clock,
    Counts,
    PartRef,
    commit_part,
    committed_part,
    drop_part,
    iter_part,
    list_parts,
    part_manifest,
    read_part,
)
from storage.trainset import TrainRow, TrainSet, TrainSetRef, build_trainset, open_trainset

__all__ = [
    "CaptionSetConfig",
    "Clock",
    "ConfigError",
    "CorruptData",
    "CorruptPart",
    "CorruptShard",
    "Counts",
    "DownloadConfig",
    "EmptyInput",
    "EmptyTrainSet",
    "ImageSetConfig",
    "Lake",
    "LakeBusy",
    "LakeNotFound",
    "ModelRef",
    "PartRef",
    "QueryRefused",
    "SchemaVersionError",
    "SettingsChanged",
    "ShardRef",
    "StaleOutput",
    "StorageError",
    "TrainRow",
    "TrainSet",
    "TrainSetRef",
    "TransientError",
    "UrlListConfig",
    "adopt_images",
    "basis_of",
    "build_trainset",
    "by_hand",
    "caption_id",
    "carried_model",
    "carried_part",
    "commit_part",
    "committed_part",
    "connect",
    "decide",
    "decide_variant",
    "drop_part",
    "fingerprint",
    "fingerprint_of",
    "image_id",
    "ingest_captions",
    "ingest_urls",
    "iter_part",
    "iter_shard",
    "layout",
    "list_parts",
    "local_folder",
    "open_trainset",
    "part_manifest",
    "query",
    "read_image",
    "read_part",
    "registry",
    "rounds",
    "write_catalog",
]
