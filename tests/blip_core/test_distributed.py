import json
import logging
from pathlib import Path

import pytest
import ranks
import torch

from blip_core import Batch, ConfigError, train
from blip_core.distributed import World, current_world, join_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave behind; they are started once for all tests."""
    path = tmp_path_factory.mktemp("ranks")
    ranks.run_two(Path(ranks.__file__), path)
    return path


def _history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_two_ranks_have_the_losses_and_gradients_of_one_process(folder: Path) -> None:
    grads, numbers = ranks.gradients(ranks.batch(0), World())
    for rank in range(2):
        theirs, their_numbers = torch.load(folder / f"gradients-{rank}.pt", weights_only=True)
        assert their_numbers == pytest.approx(numbers, abs=1e-5)
        assert theirs.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(theirs[name], grad, atol=1e-5, rtol=1e-4, msg=name)
    assert max(float(grad.abs().max()) for grad in grads.values()) > 0.01


def test_two_ranks_train_as_one_process_with_all_batches(folder: Path, tmp_path: Path) -> None:
    alone = train(ranks.start(), ranks.tokenizer(), ranks.batch, ranks.run_config(), tmp_path)
    for line, other in zip(alone.history, _history(folder / "plain"), strict=True):
        for name in ("loss", "loss_itc", "loss_itm", "loss_lm", "itm_accuracy", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-3), (line["step"], name)


def test_ranks_read_the_same_batches_and_end_with_the_same_weights(folder: Path) -> None:
    (seen, weights), (others_seen, others) = (
        torch.load(folder / f"plain-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert seen == others_seen == [0, 1, 2, 3]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert len(_history(folder / "plain")) == 4, "one rank writes"


def test_ranks_that_accumulate_weigh_every_token_alike(folder: Path, tmp_path: Path) -> None:
    def two(step: int) -> Batch:
        return ranks.joined(4 * step, 4)

    config = ranks.run_config(objectives=("lm",), batch_size=4 * ranks.ROWS)
    alone = train(ranks.start(), ranks.tokenizer(), two, config, tmp_path)
    for line, other in zip(alone.history, _history(folder / "lm"), strict=True):
        assert other["loss_lm"] == pytest.approx(line["loss_lm"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)


def test_ranks_killed_and_resumed_end_with_the_same_bits(folder: Path) -> None:
    hashes = [torch.load(folder / f"hashes-{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(hashes[0]) == 2, "undisturbed, and resumed"
    assert len({*hashes[0], *hashes[1]}) == 1


def test_run_of_two_ranks_goes_on_alone_where_its_data_stopped(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def source(number: int) -> Batch:
        seen.append(number)
        return ranks.batch(number)

    config = ranks.run_config(negatives_from="rank")
    with caplog.at_level(logging.WARNING):
        result = train(ranks.start(0.1), ranks.tokenizer(), source, config, folder / "left")
    assert (result.resumed_from, result.steps) == (2, 4)
    assert seen == [2, 3]
    assert "trained by 2 ranks until step 2 and goes on with 1" in caplog.text


def test_world_of_one_exchanges_nothing() -> None:
    world, rows = World(), torch.arange(6.0).view(3, 2)
    assert current_world() == world
    assert world.gather(rows) is rows
    assert world.gather_with_grad(rows) is rows
    assert world.gather_padded(rows, 0) is rows
    assert world.own_rows(3) == slice(0, 3)


def test_join_world_without_torchrun_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with join_world("cpu") as (world, device):
        assert (world, device) == (World(), torch.device("cpu"))


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ConfigError, match=r"'cuda:1' is one GPU, but 2 processes .* give 'cuda'"),
        join_world("cuda:1"),
    ):
        pytest.fail("joined")


def test_one_process_alone_gets_the_gpu_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cuda:1") as (world, device):
        assert (world, device) == (World(), torch.device("cuda", 1))


def test_batch_that_ranks_cannot_share_is_refused(folder: Path) -> None:
    error = (folder / "odd-1.txt").read_text()
    assert "batch_size 7 cannot be shared equally by 2 ranks" in error
    assert "was given 4 pairs, but its part of batch_size 12 is 6" in error
