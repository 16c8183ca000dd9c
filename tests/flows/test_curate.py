"""The runner's rows do not depend on how they were made, and what is damaged costs itself alone."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from cycle import FinishedCycle, before_captioning, bootstrap, file_hashes

from blip_core import CaptionConfig, Captioner, MEDCaptioner, MEDScorer
from flows import models
from flows.errors import Stopped
from flows.session import Run
from flows.settings import decoding_fields, merge, parse_settings
from flows.steps import curate
from flows.steps.curate import Curation
from flows.steps.curate_shards import Curated, Tally, curate_shards
from flows.steps.shard_jobs import ShardDone
from flows.steps.shards import web_parts
from flows.stopping import Stop
from storage import (
    CorruptShard,
    Lake,
    ModelRef,
    drop_part,
    layout,
    list_parts,
    part_manifest,
    rounds,
)

TABLES = ("tables/captions/round=0001", "tables/scores/round=0001")


@pytest.fixture
def cycle(finished: FinishedCycle, tmp_path: Path) -> FinishedCycle:
    """A lake whose round 1 has its models, and neither captions nor scores of its own."""
    return before_captioning(finished, tmp_path)


def _run(cycle: FinishedCycle, **changes: Any) -> Run:
    settings = parse_settings(merge(cycle.settings, changes))
    return Run(Lake.open(str(cycle.lake)), settings, 1)


def _ignore(done: int, total: int, note: str) -> None:
    return


def _curated(run: Run, *, fused: bool = False) -> list[Curated]:
    """Captions and scores in two passes, or in one."""
    captioner, scorer = (models.require(run, role, 1) for role in ("captioner", "filter"))
    passes = [(captioner, scorer)] if fused else [(captioner, None), (None, scorer)]
    return [curate_shards(run, *each, _ignore) for each in passes]


def _decodes(process: psutil.Process) -> bool:
    try:
        return "flows.decode_worker" in " ".join(process.cmdline())
    except psutil.Error:
        return False  # it has ended meanwhile


def _parquet(lake: Path) -> dict[str, str]:
    return {k: v for k, v in file_hashes(lake, *TABLES).items() if k.endswith(".parquet")}


def _rows(lake: Path, table: str) -> list[dict[str, Any]]:
    folder = lake / "tables" / table / "round=0001"
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


@pytest.mark.parametrize("fused", [False, True], ids=["two_passes", "one_pass"])
@pytest.mark.parametrize("decode_in", ["threads", "processes"])
def test_rows_have_the_same_bytes_however_they_are_made(
    finished: FinishedCycle, cycle: FinishedCycle, decode_in: str, fused: bool
) -> None:
    run = _run(cycle, machine={"decode_in": decode_in, "decode_workers": 2})
    curated = _curated(run, fused=fused)
    assert sum(each.built for each in curated) == 2 * len(web_parts(run))
    expected = _parquet(finished.lake)
    assert len(expected) == 2 * len(web_parts(run))
    assert _parquet(cycle.lake) == expected


def test_one_pass_decodes_an_image_once_and_finds_what_is_committed(
    finished: FinishedCycle, cycle: FinishedCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = curate.decoders_of

    def counted(*args: Any) -> Any:
        decoders = original(*args)
        plain = decoders.decode
        decoders.decode = lambda images: decoded.append(len(images)) or plain(images)
        return decoders

    monkeypatch.setattr(curate, "decoders_of", counted)
    run = _run(cycle)
    (first,) = _curated(run, fused=True)
    num_images = len({row["image_id"] for row in _rows(cycle.lake, "captions")})
    assert sum(decoded) == num_images
    decoded.clear()
    (again,) = _curated(run, fused=True)
    assert (again.built, decoded) == (0, [])
    assert again.parts == first.parts
    # Captions are there, scores of one shard are not: only that shard's texts are scored.
    lost = list_parts(run.lake, "scores", 1)[1]
    drop_part(run.lake, lost)
    (mended,) = _curated(run, fused=True)
    assert mended.built == 1
    assert _parquet(cycle.lake) == _parquet(finished.lake)


def test_one_pass_gives_each_model_its_own_resolution(
    cycle: FinishedCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set[int]()

    def larger(run: Run, ref: ModelRef) -> Captioner:
        settings, loaded = run.settings.caption, models.load_copy(run, ref, image_size_px=48)
        config = CaptionConfig(seed=run.settings.seed, **decoding_fields(settings))
        transform = models.eval_transform(run, loaded, quick=True)
        sizes.add(transform.size)
        return MEDCaptioner(loaded.model, loaded.tokenizer, config, run.device, transform)  # type: ignore[return-value]

    monkeypatch.setattr(models, "captioner_of", larger)
    run = _run(cycle)
    _curated(run)
    expected = _parquet(cycle.lake)
    for table in ("captions", "scores"):
        for part in list_parts(run.lake, table, 1):
            drop_part(run.lake, part)
    _curated(run, fused=True)
    assert _parquet(cycle.lake) == expected
    scorer = models.scorer_of(run, models.require(run, "filter", 1))
    assert {*sizes, scorer.transform.size} == {48, 32}  # type: ignore[attr-defined]


def test_captions_have_the_same_words_in_batches_of_any_size(
    finished: FinishedCycle, cycle: FinishedCycle
) -> None:
    expected = [(row["caption_id"], row["caption"]) for row in _rows(finished.lake, "captions")]
    for size in (1, 7, "auto"):
        changes = {"caption": {"batch_size": size}, "score": {"batch_size": size}}
        run = _run(cycle, machine={"on_stale": "rebuild"}, **changes)
        for table in ("captions", "scores"):
            for part in list_parts(run.lake, table, 1):
                drop_part(run.lake, part)
        _curated(run)
        found = [(row["caption_id"], row["caption"]) for row in _rows(cycle.lake, "captions")]
        assert found == expected, size
        scores = _rows(cycle.lake, "scores")
        for ours, theirs in zip(scores, _rows(finished.lake, "scores"), strict=True):
            assert ours["itm_prob"] == pytest.approx(theirs["itm_prob"], abs=1e-5)
    sizes = json.loads((cycle.lake / "work" / "batch_sizes.json").read_text(encoding="utf-8"))
    assert len(sizes) == 2, "what was measured is remembered, for each model"
    assert all(entry["size"] >= 1 for entry in sizes.values())


def test_manifest_says_where_the_time_went(cycle: FinishedCycle) -> None:
    run = _run(cycle)
    _curated(run)
    for table, step in (("captions", "generate"), ("scores", "score")):
        for part in list_parts(run.lake, table, 1):
            timings = part_manifest(run.lake, part).timings
            assert set(timings) == {"read", "decode", "wait", "encode", step, "write"}
            assert timings["encode"] > 0
            assert timings[step] > 0


def test_progress_tells_rate_time_left_and_outcomes(cycle: FinishedCycle) -> None:
    told: list[tuple[int, int, str]] = []
    run = _run(cycle)
    captioner = models.require(run, "captioner", 1)
    curated = curate_shards(run, captioner, None, lambda *seen: told.append(seen))
    total = sum(part.num_rows for part in web_parts(run))
    assert told[-1][:2] == (total, total)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert "images/s" in told[1][2]
    assert " left" in told[1][2]
    assert f"ok {curated.outcomes['ok']}" in told[-1][2]
    assert curated.outcomes.total() == len(_rows(cycle.lake, "captions"))


def test_scores_of_a_shard_do_not_depend_on_what_was_scored_before_it(
    cycle: FinishedCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a scorer remembers of texts, it shows here: each text it knows turns the features of the next."""
    original = MEDScorer._text_features

    def coarse(self: Any, texts: list[str]) -> torch.Tensor:
        turn = 0.001 * len(self._features)
        return original(self, texts) + turn

    monkeypatch.setattr(MEDScorer, "_text_features", coarse)
    run = _run(cycle)
    _curated(run)
    whole = _parquet(cycle.lake)
    for part in list_parts(run.lake, "scores", 1)[1:]:
        drop_part(run.lake, part)
    _curated(run)
    assert _parquet(cycle.lake) == whole


@pytest.mark.parametrize("damage", ["member", "cut"])
def test_damaged_tar_costs_the_images_that_it_lost_and_no_other(
    finished: FinishedCycle, cycle: FinishedCycle, damage: str
) -> None:
    run = _run(cycle)
    shard = web_parts(run)[0].name
    path = cycle.lake / layout.shard(shard)
    rows = [
        row
        for row in pq.read_table(cycle.lake / layout.part("pairs", shard)).to_pylist()
        if row["status"] == "ok"
    ]
    if damage == "cut":
        lost = {row["image_id"] for row in rows[9:]}
        path.write_bytes(path.read_bytes()[: rows[9]["offset"] + 40])
    else:
        lost = {rows[4]["image_id"]}
        whole, start = path.read_bytes(), rows[4]["offset"] - 512
        end = rows[5]["offset"] - 512
        path.write_bytes(whole[:start] + whole[end:])
    _curated(run)
    theirs = {row["image_id"]: row for row in _rows(finished.lake, "captions")}
    for row in _rows(cycle.lake, "captions"):
        if row["image_id"] in lost:
            assert (row["status"], row["caption"]) == ("decode_error", None)
        else:
            assert row["caption"] == theirs[row["image_id"]]["caption"]
    failed = {
        row["image_id"]: row["error"]
        for row in _rows(cycle.lake, "scores")
        if row["status"] == "decode_error"
    }
    assert set(failed) == lost
    assert all("has not the image at bytes" in error for error in failed.values())


def test_shard_that_holds_none_of_its_images_is_an_error_and_no_table_of_failures(
    cycle: FinishedCycle,
) -> None:
    run = _run(cycle)
    shard = web_parts(run)[1].name
    path = cycle.lake / layout.shard(shard)
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CorruptShard, match=rf"{shard} .* holds none of its \d+ images; restore it"):
        _curated(run)
    assert [part.name for part in list_parts(run.lake, "captions", 1)] == [web_parts(run)[0].name]


@pytest.mark.parametrize(
    ("model", "method"), [(MEDCaptioner, "caption"), (MEDScorer, "score")], ids=["caption", "score"]
)
def test_memory_that_runs_out_halves_the_batches_and_loses_no_row(
    finished: FinishedCycle,
    cycle: FinishedCycle,
    monkeypatch: pytest.MonkeyPatch,
    model: type,
    method: str,
) -> None:
    sizes = []
    original: Callable[..., Any] = getattr(model, method)

    def limited(self: Any, pixel_values: torch.Tensor, rest: Any) -> Any:
        sizes.append(len(pixel_values))
        if len(pixel_values) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, pixel_values, rest)

    monkeypatch.setattr(model, method, limited)
    run = _run(cycle)
    _curated(run)
    assert [size for size in sizes if size > 5] == [16, 8, 8], "it is remembered after the first"
    ours, theirs = (_rows(lake, "captions") for lake in (cycle.lake, finished.lake))
    assert [row["caption_id"] for row in ours] == [row["caption_id"] for row in theirs]
    assert [row["status"] for row in _rows(cycle.lake, "scores")] == ["ok"] * len(
        _rows(finished.lake, "scores")
    )


def test_killed_decoding_process_changes_no_row(
    finished: FinishedCycle, cycle: FinishedCycle
) -> None:
    machine = {"decode_in": "processes", "decode_workers": 2}
    run = _run(cycle, machine=machine)
    killed: list[int] = []

    class Killer(Tally):
        def images(self, pairs: Any, count: int) -> None:
            super().images(pairs, count)
            alive = [child.pid for child in psutil.Process().children() if _decodes(child)]
            if len(killed) < 3 and alive:
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])

    for captioner, scorer in (("captioner", None), (None, "filter")):
        refs = [models.require(run, role, 1) if role else None for role in (captioner, scorer)]
        Curation(run, *refs, Killer(1, _ignore)).run_shards(web_parts(run))
    assert killed
    assert _parquet(cycle.lake) == _parquet(finished.lake)


@pytest.mark.parametrize("grace_s", [0.0, 1e6], ids=["given_up", "finished"])
def test_shard_under_way_is_given_up_or_finished_when_an_end_is_asked_for(
    finished: FinishedCycle, cycle: FinishedCycle, grace_s: float
) -> None:
    run = _run(cycle, machine={"stop_grace_s": grace_s}, caption={"batch_size": 4})
    stop, second = Stop(), web_parts(run)[1].name
    seen: list[str] = []

    class Asking(Tally):
        def images(self, pairs: Any, count: int) -> None:
            super().images(pairs, count)
            if pairs.name == second and not seen:
                seen.append(pairs.name)
                stop.ask()

    captioner = models.require(run, "captioner", 1)
    curation = Curation(run, captioner, None, Asking(1, _ignore), stop)
    with pytest.raises(Stopped) as caught:
        curation.run_shards(web_parts(run))
    names = [part.name for part in list_parts(run.lake, "captions", 1)]
    first = web_parts(run)[0].name
    if grace_s:
        assert f"shard {second} was finished and committed" in str(caught.value)
        assert names == [first, second]
    else:
        assert f"shard {second} was given up after 16 of " in str(caught.value)
        assert names == [first]
    _curated(_run(cycle, caption={"batch_size": 4}))
    ours, theirs = (_rows(lake, "captions") for lake in (cycle.lake, finished.lake))
    assert [row["caption"] for row in ours] == [row["caption"] for row in theirs]


def test_done_shard_is_told_once_it_can_be_read(cycle: FinishedCycle) -> None:
    run = _run(cycle)

    class Reading(Tally):
        def shard(self, done: ShardDone) -> None:
            super().shard(done)
            for part in done.parts:
                assert part_manifest(run.lake, part).num_rows == part.num_rows

    captioner = models.require(run, "captioner", 1)
    tally = Reading(1, _ignore)
    Curation(run, captioner, None, tally).run_shards(web_parts(run))
    assert len(tally.curated.parts) == len(web_parts(run))


def test_curate_command_in_one_pass_finds_what_two_passes_made(
    finished: FinishedCycle, cycle: FinishedCycle, api_url: str
) -> None:
    lake = Lake.open(str(cycle.lake))
    for part in list_parts(lake, "decisions", 1):
        drop_part(lake, part)
    command = ["curate", "--config", str(cycle.config), "--set", "curate.fused=true"]
    done = bootstrap(*command, cwd=cycle.folder, api_url=api_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _parquet(cycle.lake) == _parquet(finished.lake)
    decisions = "tables/decisions/round=0001"
    ours, theirs = (file_hashes(each.lake, decisions) for each in (cycle, finished))
    assert {v for k, v in ours.items() if k.endswith(".parquet")} == {
        v for k, v in theirs.items() if k.endswith(".parquet")
    }
    record = rounds.read_round(lake, 1)
    assert record is not None
    assert record.seconds["caption-and-score"] > 0
    assert record.speed["caption-and-score"]["images_per_s"] > 0
    assert 0 <= record.speed["caption-and-score"]["share_waited"] <= 1
    assert record.counts["caption_rows"] == len(_rows(cycle.lake, "captions"))
