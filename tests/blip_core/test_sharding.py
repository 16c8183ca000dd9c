import json
import logging
from pathlib import Path

import pytest
import ranks
import sharded_ranks
import torch
from safetensors.torch import load_file

from blip_core import Batch, ConfigError, TrainConfig, train
from blip_core.distributed import World
from blip_core.momentum import MomentumEncoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave behind; they are started once for all tests."""
    path = tmp_path_factory.mktemp("sharded")
    ranks.run_two(Path(sharded_ranks.__file__), path)
    return path


def _history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def _assert_close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_sharded_ranks_have_the_losses_and_gradients_of_one_process(folder: Path) -> None:
    grads, numbers = ranks.gradients(ranks.batch(0), World())
    for rank in range(2):
        theirs, their_numbers = torch.load(folder / f"gradients-{rank}.pt", weights_only=True)
        assert their_numbers == pytest.approx(numbers, abs=1e-5)
        _assert_close(theirs, grads)


def test_a_rank_holds_its_part_of_everything(folder: Path) -> None:
    model = ranks.start()
    num_weights = sum(each.numel() for each in model.parameters())
    num_twins = sum(each.numel() for each in MomentumEncoders(model, 0).parameters())
    whole = {"weights": num_weights, "gradients": num_weights}
    whole |= {"optimizer": 2 * num_weights, "momentum": num_twins}
    held = [torch.load(folder / f"held-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, number in whole.items():
        # positions lie on the first rank alone, step counts and the scale on both
        assert max(each[name] for each in held) < 0.6 * number, name
        assert sum(each[name] for each in held) >= number - model.config.text.max_positions, name


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [
        ("plain", {}, 1e-3),
        (
            "less",
            {"checkpoint_blocks": 1, "freeze": ("vision.patch_embed",), "grad_clip_norm": None},
            1e-3,
        ),
        ("half", {"dtype": "bfloat16"}, 0.05),
    ],
)
def test_sharded_ranks_train_as_one_process_with_all_batches(
    name: str, changes: dict, tolerance: float, folder: Path, tmp_path: Path
) -> None:
    model = ranks.start()
    alone = train(model, ranks.tokenizer(), ranks.batch, ranks.run_config(**changes), tmp_path)
    for line, other in zip(alone.history, _history(folder / name), strict=True):
        for key in ("loss", "loss_itc", "loss_itm", "loss_lm", "scale", "grad_norm"):
            assert other[key] == pytest.approx(line[key], rel=tolerance), (line["step"], key)
    clipped = [line["grad_norm"] > 1.0 for line in alone.history]
    assert any(clipped), "the norm of all ranks' gradients is what clipping divides by"


def test_sharded_ranks_end_with_the_same_whole_model(folder: Path) -> None:
    models = [torch.load(folder / f"plain-{rank}.pt", weights_only=True) for rank in range(2)]
    saved = load_file(str(folder / "plain" / "step-000004" / "model.safetensors"))
    for state in models:
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())


def test_sharded_ranks_that_accumulate_weigh_every_token_alike(
    folder: Path, tmp_path: Path
) -> None:
    config = ranks.run_config(objectives=("lm",), batch_size=4 * ranks.ROWS)

    def two(step: int) -> Batch:
        return ranks.joined(4 * step, 4)

    alone = train(ranks.start(), ranks.tokenizer(), two, config, tmp_path)
    for line, other in zip(alone.history, _history(folder / "lm"), strict=True):
        assert other["loss_lm"] == pytest.approx(line["loss_lm"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)


def test_sharded_ranks_killed_and_resumed_end_with_the_same_bits(folder: Path) -> None:
    hashes = [torch.load(folder / f"hashes-{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(hashes[0]) == 2, "undisturbed, and resumed"
    assert len({*hashes[0], *hashes[1]}) == 1


def test_checkpoint_of_sharded_ranks_has_the_files_of_one_process(
    folder: Path, tmp_path: Path
) -> None:
    train(ranks.start(), ranks.tokenizer(), ranks.batch, ranks.run_config(), tmp_path)
    for part in ("model", "optimizer", "momentum"):
        file = Path("step-000004") / f"{part}.safetensors"
        alone, sharded = load_file(str(tmp_path / file)), load_file(str(folder / "plain" / file))
        assert {k: (v.shape, v.dtype) for k, v in sharded.items()} == {
            k: (v.shape, v.dtype) for k, v in alone.items()
        }


def test_sharded_run_goes_on_in_one_process(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, config = ranks.start(0.1), ranks.run_config(negatives_from="rank")
    with caplog.at_level(logging.WARNING):
        result = train(model, ranks.tokenizer(), ranks.batch, config, folder / "left")
    assert (result.resumed_from, result.steps) == (2, 4)
    assert "trained by 2 ranks until step 2 and goes on with 1" in caplog.text


def test_run_of_whole_ranks_goes_on_sharded(folder: Path) -> None:
    found = torch.load(folder / "from-shared-0.pt", weights_only=True)
    said = "weights were whole on every rank until step 2 and are split from now on"
    assert said in (folder / "warned-0.txt").read_text()
    assert said not in (folder / "warned-1.txt").read_text()
    name = Path("whole") / "step-000004" / "model.safetensors"
    _assert_close(found, load_file(str(folder / "shared" / name)))


def test_sharded_ranks_evaluate_and_keep_the_best_whole_model(folder: Path) -> None:
    found = torch.load(folder / "best.pt", weights_only=True)
    kept = load_file(str(folder / "best" / "best-000001" / "model.safetensors"))
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_one_process_has_nothing_to_shard(tmp_path: Path) -> None:
    models = [ranks.start(), ranks.start()]
    for model, sharding in zip(models, ("none", "full"), strict=True):
        config = ranks.run_config(steps=2, sharding=sharding)
        train(model, ranks.tokenizer(), ranks.batch, config, tmp_path / sharding)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_sharding_is_refused() -> None:
    with pytest.raises(ConfigError, match="sharding must be none or full, got 'half'"):
        TrainConfig(steps=1, batch_size=1, queue_size=0, sharding="half")  # type: ignore[arg-type]
