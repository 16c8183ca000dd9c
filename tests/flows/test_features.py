"""Image tokens that are computed once are those that a step would compute, for the same rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cycle import FinishedCycle, copied

from blip_core import MED, EvalTransform, TrainTransform
from flows import models
from flows.features import frozen_features
from flows.feed import TrainFeed
from flows.session import Run
from flows.settings import parse_settings
from storage import Lake, TrainSet, build_trainset, open_trainset

SQL = "SELECT * FROM raw UNION ALL SELECT * FROM human"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def run(finished: FinishedCycle, tmp_path: Path) -> Run:
    cycle = copied(finished, tmp_path)
    return Run(Lake.open(str(cycle.lake)), parse_settings(cycle.settings), 1)


@pytest.fixture
def rows(run: Run) -> TrainSet:
    return open_trainset(run.lake, build_trainset(run.lake, SQL, name="features"))


@pytest.fixture
def model(run: Run) -> MED:
    return models.load(run, models.require(run, "filter", 1)).model


def _feed(run: Run, rows: TrainSet, **more: object) -> TrainFeed:
    transform = TrainTransform(32, augment="none", mean=MEAN, std=STD)
    return TrainFeed(run.lake, rows, transform, batch_size=9, seed=3, workers=2, **more)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@torch.no_grad()
def test_feed_of_cached_tokens_gives_the_rows_of_the_feed_of_pixels(
    run: Run, rows: TrainSet, model: MED, tmp_path: Path, dtype: str, close: float
) -> None:
    seen: list[tuple[int, int]] = []
    features = frozen_features(
        run,
        rows,
        model,
        EvalTransform(32, mean=MEAN, std=STD),
        tmp_path / "features",
        dtype=dtype,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    pixels, cached = _feed(run, rows), _feed(run, rows, features=features)
    for step in range(8):
        wanted, found = pixels(step), cached(step)
        assert found.captions == wanted.captions
        assert found.image_ids == wanted.image_ids
        assert found.pixel_values is None
        assert found.image_embeds is not None
        assert found.image_embeds.dtype == getattr(torch, dtype)
        expected = model.encode_image(wanted.pixel_values)
        torch.testing.assert_close(found.image_embeds.float(), expected, atol=close, rtol=close)
    images = {rows.row(i).image_id for i in range(len(rows))}
    assert seen[-1] == (len(images), len(images))
    assert len(images) < len(rows), "several texts of an image share its tokens"


def test_images_that_cannot_be_decoded_are_passed_over(
    run: Run, rows: TrainSet, model: MED, tmp_path: Path
) -> None:
    bad = rows.row(0)
    tar = Path(run.lake.root.local_path(f"shards/{bad.shard}.tar") or "")
    with tar.open("r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.size))
    transform = EvalTransform(32, mean=MEAN, std=STD)
    features = frozen_features(
        run,
        rows,
        model,
        transform,
        tmp_path / "features",
        dtype="float32",
        on_progress=lambda done, total: None,
    )
    feed = _feed(run, rows, features=features)
    batches = [feed(step) for step in range(len(rows) // 9)]
    assert feed.num_skipped > 0
    assert all(bad.image_id not in batch.image_ids for batch in batches)


def test_a_file_that_was_cut_short_by_a_kill_is_made_again(
    run: Run, rows: TrainSet, model: MED, tmp_path: Path
) -> None:
    transform = EvalTransform(32, mean=MEAN, std=STD)
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for folder, on_progress in ((cut, stop), (whole, lambda done, total: None), (cut, print)):
        try:
            frozen_features(
                run,
                rows,
                model,
                transform,
                folder,
                dtype="float32",
                on_progress=on_progress,
            )
        except KeyboardInterrupt:
            assert folder == cut
            assert not (cut / "features.npy").exists()
    for name in ("features.npy", "places.npy"):
        assert np.array_equal(np.load(whole / name), np.load(cut / name))
