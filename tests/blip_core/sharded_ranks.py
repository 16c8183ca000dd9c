"""One rank of a small training whose weights are split over the ranks; test_sharding starts two of them.

usage: sharded_ranks.py FOLDER. Leaves gradients, weights and checkpoints below FOLDER.
"""

import logging
import sys
from pathlib import Path

import ranks
import torch

from blip_core import MED, train
from blip_core.distributed import World, join_world
from blip_core.split_tensors import own_part
from blip_core.step import Stepper

FULL = {"sharding": "full"}


def main(folder: Path) -> None:
    with join_world("cpu") as (world, device):
        grads, numbers = ranks.gradients(ranks.batch(0), world, **FULL)
        torch.save((grads, numbers), folder / f"gradients-{world.rank}.pt")
        torch.save(_held(world, device), folder / f"held-{world.rank}.pt")
        words, model = ranks.tokenizer(), ranks.start()
        config = ranks.run_config(**FULL)
        train(model, words, ranks.batch, config, folder / "plain")
        torch.save(model.state_dict(), folder / f"plain-{world.rank}.pt")
        lm = ranks.run_config(objectives=("lm",), accumulate_steps=2, **FULL)
        train(ranks.start(), words, ranks.batch, lm, folder / "lm")
        less = {"checkpoint_blocks": 1, "freeze": ("vision.patch_embed",), "grad_clip_norm": None}
        train(ranks.start(), words, ranks.batch, ranks.run_config(**less, **FULL), folder / "less")
        half = ranks.run_config(dtype="bfloat16", **FULL)
        train(ranks.start(), words, ranks.batch, half, folder / "half")
        ranks.killed_and_resumed(folder, **FULL)
        _evaluated(folder)
        (folder / "shared").mkdir(exist_ok=True)
        ranks.killed_and_resumed(folder / "shared")
        resumed = ranks.start(dropout=0.1)
        config = ranks.run_config(negatives_from="rank", **FULL)
        with (folder / f"warned-{world.rank}.txt").open("w") as stream:
            handler = logging.StreamHandler(stream)
            logging.getLogger("blip_core").addHandler(handler)
            result = train(resumed, words, ranks.batch, config, folder / "shared" / "left")
            logging.getLogger("blip_core").removeHandler(handler)
        assert result.resumed_from == 2
        torch.save(resumed.state_dict(), folder / f"from-shared-{world.rank}.pt")


def _held(world: World, device: torch.device) -> dict[str, int]:
    """Numbers that this rank holds after a step, by what they are."""
    stepper = Stepper(ranks.start(), ranks.tokenizer(), ranks.run_config(**FULL), world, device)
    stepper.begin()
    assert stepper.do(0, [ranks.batch(0)]) is not None
    assert stepper.momentum is not None
    parameters = list(stepper.model.parameters())
    states = [value for state in stepper.optimizer.state.values() for value in state.values()]
    held = {
        "weights": parameters,
        "gradients": [each.grad for each in parameters if each.grad is not None],
        "optimizer": states,
        "momentum": list(stepper.momentum.parameters()),
    }
    return {name: sum(own_part(each).numel() for each in all_) for name, all_ in held.items()}


def _evaluated(folder: Path) -> None:
    """Keep the best of models that get worse: the first."""

    def scale(model: MED, step: int) -> dict[str, float]:
        assert not model.training
        return {"bias": float(model.scale) + step}

    model = ranks.start()
    config = ranks.run_config(best_metric="bias", evaluate_every_steps=1, patience=2, **FULL)
    result = train(model, ranks.tokenizer(), ranks.batch, config, folder / "best", evaluate=scale)
    assert (result.best_step, result.steps) == (1, 3)
    torch.save(model.state_dict(), folder / "best.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
