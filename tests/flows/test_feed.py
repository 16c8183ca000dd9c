"""Batches of a training set: the same for any workers and ranks, from any step on, and what is skipped."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cycle import tiny_settings
from PIL import Image

from blip_core import (
    Batch,
    DecodeError,
    EvalTransform,
    MEDConfig,
    TrainTransform,
    build_model,
    decode_image,
)
from blip_core.distributed import World
from flows.errors import SettingsError
from flows.features import frozen_features
from flows.feed import TrainFeed
from flows.order import EpochOrder
from flows.session import Run
from flows.settings import parse_settings
from flows.skipped import SkippedRows
from flows.steps.plan import TrainPlan, train_config
from flows.steps.train import train_model
from storage import (
    CaptionSetConfig,
    Lake,
    TrainSet,
    build_trainset,
    ingest_captions,
    open_trainset,
    query,
    read_image,
)

NUM_IMAGES = 7
SQL = """
SELECT image_id, caption, source FROM human
UNION ALL
SELECT image_id, 'they say: ' || caption, 'synthetic' FROM human
"""
WEIGHTS = {"web": 1, "synthetic": 1, "human": 2}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A lake of a few pictures with two human captions each, and settings that draw one of four."""
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "images").mkdir()
    for index in range(NUM_IMAGES):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        texts = ("a red ring", f"{index} blue squares")
        rows += [{"image": f"{index}.png", "caption": text} for text in texts]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _run(tmp_path, tmp_path / "lake")


def _run(folder: Path, lake_folder: Path) -> Run:
    settings = tiny_settings(lake_folder, folder / "world")
    settings["model"] |= {"preset": "nano", "image_size_px": 32}
    settings["pretrain"] = settings["pretrain"] | {
        "steps": 8,
        "batch_size": 6,
        "queue_size": 0,
        "augment": "paper",
        "log_every_steps": 1,
        "captions_per_epoch": "one",
        "source_weights": WEIGHTS,
    }
    lake = Lake.open(str(lake_folder), create=True)
    config = CaptionSetConfig(
        captions=str(folder / "captions.jsonl"),
        images=str(folder / "images"),
        pool="human",
        name="few",
    )
    ingest_captions(lake, config)
    return Run(lake, parse_settings(settings), 0)


def _plan(run: Run) -> TrainPlan:
    return TrainPlan(
        name="pretrain",
        role="med",
        round=0,
        sql=SQL,
        objectives=("lm",),
        parent=None,
        tokenizer_of=None,
        settings=run.settings.pretrain,
    )


def _feed(run: Run, *, workers: int = 1, world: World | None = None, **more: object) -> TrainFeed:
    rows = _rows(run)
    return TrainFeed(
        run.lake,
        rows,
        TrainTransform(32, augment="paper", mean=MEAN, std=STD),
        batch_size=6,
        seed=3,
        workers=workers,
        world=world,
        order=_order(rows, seed=3),
        **more,
    )


def _order(rows: TrainSet, seed: int) -> EpochOrder:
    return EpochOrder(rows, seed=seed, captions_per_epoch="one", source_weights=WEIGHTS)


def _num_skipped(run: Run, bad: str, seed: int, num_positions: int) -> int:
    """How often the order alone says that a row is passed over."""
    rows = _rows(run)
    order = _order(rows, seed)
    is_bad = [rows.row(order.row(i)).image_id == bad for i in range(num_positions + 3)]
    return sum(
        is_bad[i] + (is_bad[i] and is_bad[i + 1])  # the last of an epoch, the first of the next
        for i in range(num_positions)
    )


def _rows(run: Run) -> TrainSet:
    return open_trainset(run.lake, build_trainset(run.lake, SQL, name="feed"))


def _spoil_an_image(run: Run) -> str:
    """Overwrite the bytes of one stored image; its id."""
    bad = _rows(run).row(0)
    tar = Path(run.lake.root.local_path(f"shards/{bad.shard}.tar") or "")
    with tar.open("r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.size))
    return bad.image_id


def _assert_same(found: Batch, expected: Batch) -> None:
    assert found.captions == expected.captions
    assert found.image_ids == expected.image_ids
    assert torch.equal(found.pixel_values, expected.pixel_values)


def test_drawn_captions_are_the_same_for_any_workers_ranks_and_first_step(run: Run) -> None:
    one = _feed(run)
    expected = [one(step) for step in range(9)]
    many, late = _feed(run, workers=4), _feed(run, workers=2)
    ranks = [_feed(run, workers=2, world=World(rank=rank, size=2)) for rank in (0, 1)]
    for step, batch in enumerate(expected):
        _assert_same(many(step), batch)
        parts = [feed(step) for feed in ranks]
        joined = Batch(
            captions=[text for part in parts for text in part.captions],
            image_ids=[image for part in parts for image in part.image_ids],
            pixel_values=torch.cat([part.pixel_values for part in parts]),
        )
        _assert_same(joined, batch)
        if step >= 4:  # in the middle of an epoch of 7 images
            _assert_same(late(step), batch)
    images = [image for batch in expected for image in batch.image_ids]
    for epoch in range(NUM_IMAGES):
        assert len(set(images[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES])) == NUM_IMAGES
    for feed in (one, many, late, *ranks):
        feed.close()


def test_skipped_rows_are_counted_once_by_all_ranks_and_after_a_resumption(
    run: Run, tmp_path: Path
) -> None:
    bad = _spoil_an_image(run)
    skipped = SkippedRows(tmp_path / "skipped.txt")
    assert skipped.count(42) == 0
    for rank in (0, 1, 0):  # the last as after a kill
        feed = _feed(run, world=World(rank=rank, size=2), skipped=skipped)
        for step in range(7):
            assert bad not in feed(step).image_ids
        feed.close()
    assert skipped.count(42) == _num_skipped(run, bad, 3, 42) >= 6, "six epochs of seven images"
    assert skipped.count(7) == _num_skipped(run, bad, 3, 7) >= 1


def test_training_killed_in_mid_epoch_gives_the_same_bits_and_the_same_count_of_skipped_rows(
    run: Run, tmp_path: Path
) -> None:
    undisturbed = _run(tmp_path, tmp_path / "other")
    found = []
    for each in (run, undisturbed):
        bad = _spoil_an_image(each)
        stops = [5] if each is run else []

        def stop(step: int, steps: int, text: str, stops: list[int] = stops) -> None:
            if step in stops:
                stops.remove(step)
                raise KeyboardInterrupt

        if stops:
            with pytest.raises(KeyboardInterrupt):
                train_model(each, _plan(each), stop)
        ref, _ = train_model(each, _plan(each), stop)
        sql = "SELECT metric, n, value FROM metrics ORDER BY ALL"
        found.append((ref.model_id, query(each.lake, sql).to_pylist()))
    assert found[0] == found[1]
    counted = [line for line in found[0][1] if line["metric"] == "rows_skipped"]
    expected = _num_skipped(run, bad, run.settings.seed, 8 * 6)
    assert counted == [{"metric": "rows_skipped", "n": 8, "value": expected}]
    assert expected >= 6


def test_weights_that_leave_no_caption_are_refused_before_any_compute(run: Run) -> None:
    section = {"source_weights": {"web": 1, "synthetic": 0, "human": 0}}
    settings = run.settings.with_changes({"pretrain": section})
    plan = dataclasses.replace(_plan(run), settings=settings.pretrain)
    with pytest.raises(SettingsError, match=r"7 of 7 images have captions of human and synthetic"):
        train_model(run, plan, lambda *_: None)
    assert list(run.lake.scratch("train").iterdir()) == []


def test_an_epoch_of_drawn_captions_decays_once_all_images_were_read(run: Run) -> None:
    changes = {"schedule": "epoch_decay", "batch_size": 2}
    settings = run.settings.with_changes({"pretrain": changes})
    plan = dataclasses.replace(_plan(run), settings=settings.pretrain)
    feed = _feed(run)
    assert feed.rows_per_epoch == NUM_IMAGES
    assert train_config(plan, 0, feed.rows_per_epoch).steps_per_epoch == 4
    feed.close()


@torch.no_grad()
def test_cached_tokens_lie_at_the_rows_of_their_image(run: Run, tmp_path: Path) -> None:
    bad = _spoil_an_image(run)
    rows = _rows(run)
    model = build_model(MEDConfig.preset("nano", vocab_size=40, image_size_px=32), seed=0).eval()
    transform = EvalTransform(32, mean=MEAN, std=STD)
    told: list[tuple[int, int]] = []
    features = frozen_features(
        run,
        rows,
        model,
        transform,
        tmp_path / "features",
        dtype="float32",
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (NUM_IMAGES - 1, NUM_IMAGES)
    for i in range(len(rows)):
        row = rows.row(i)
        if row.image_id == bad:
            with pytest.raises(DecodeError, match="when features were made"):
                features.of_row(i)
            continue
        pixels = transform(decode_image(read_image(run.lake, row.shard, row.offset, row.size)))
        expected = model.encode_image(pixels[None])[0]
        torch.testing.assert_close(features.of_row(i), expected, atol=1e-5, rtol=1e-5)
