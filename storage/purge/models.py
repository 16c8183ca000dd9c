"""Which models were trained on images that are purged, by the training sets that lie in the lake."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from storage import catalog, layout
from storage.lake import Lake
from storage.trainset import images_in, standing

# An arm whose weights were removed is no model any more, and was trained all the same.
_MODELS = """
SELECT model_id, any_value(role), min(round), trained_on FROM (
    SELECT model_id, role, round, trained_on FROM models
    UNION ALL SELECT model_id, 'arm', round, trained_on FROM arms
) WHERE trained_on IS NOT NULL GROUP BY model_id, trained_on ORDER BY min(round), any_value(role), model_id
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOn:
    """A model and how many of the images it was trained on."""

    model_id: str
    role: str
    round: int
    trained_on: str
    """Fingerprint of its training set."""
    stored_as: str
    """Fingerprint of what of that lay in the lake: an earlier purge may have taken something out."""
    images: int


@dataclass(kw_only=True)
class Trained:
    """What was found of some images in the training sets of a lake."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows of them, by training set."""
    images: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """Rows of each, by training set."""
    models: tuple[TrainedOn, ...] = ()
    unknown: tuple[str, ...] = ()

    def by_image(self) -> dict[str, list[str]]:
        """image_id -> ids of the models that were trained on it."""
        found: dict[str, set[str]] = {}
        for model in self.models:
            for image_id in self.images[model.stored_as]:
                found.setdefault(image_id, set()).add(model.model_id)
        return {image_id: sorted(models) for image_id, models in found.items()}


def trained_on(lake: Lake, image_ids: pa.Array) -> Trained:
    """Look through every training set of the lake for some images."""
    found = Trained()
    for fingerprint in stored_sets(lake) if len(image_ids) else ():
        images = images_in(lake, fingerprint, image_ids)
        if images:
            found.images[fingerprint] = images
            found.rows[fingerprint] = sum(images.values())
    with catalog.connect(lake) as con:
        models = con.execute(_MODELS).fetchall()
    trained, unknown = [], []
    for model_id, role, round, fingerprint in models:
        stored = standing(lake, fingerprint)
        if stored is None and not lake.root.exists(layout.trainset_successor(fingerprint)):
            unknown.append(model_id)
        elif stored in found.images:
            trained.append(
                TrainedOn(
                    model_id=model_id,
                    role=role,
                    round=round,
                    trained_on=fingerprint,
                    stored_as=stored,
                    images=len(found.images[stored]),
                )
            )
    found.models, found.unknown = tuple(trained), tuple(dict.fromkeys(unknown))
    return found


def stored_sets(lake: Lake) -> list[str]:
    """Fingerprints of all training sets in the lake."""
    names = lake.root.list(layout.TRAINSETS)
    return [name.removesuffix(".arrow") for name in names if name.endswith(".arrow")]
