"""One rank of a small distributed training; test_distributed starts two of them with torchrun's variables.

usage: ranks.py FOLDER. Leaves gradients, weights and what each rank saw below FOLDER.
"""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip_core import (
    MED,
    Batch,
    BlipError,
    MEDConfig,
    MEDTokenizer,
    TrainConfig,
    build_model,
    train,
)
from blip_core.distributed import World, current_world, join_world
from blip_core.forward import Forward
from blip_core.momentum import MomentumEncoders
from blip_core.objectives import StepInputs
from blip_core.split_tensors import average_whole, whole_tensor
from blip_core.training_state import hash_tensors

TEXTS = [
    f"a {colour} {shape}" + (" on the left side of a picture" if colour == "red" else "")
    for colour in ("red", "green", "blue", "white")
    for shape in ("circle", "square", "cross", "ring")
]
ROWS = 4
"""Pairs of a rank's part."""


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


def tokenizer() -> MEDTokenizer:
    return MEDTokenizer.train([*TEXTS, "a picture of two"], vocab_size=120)


def start(dropout: float = 0.0) -> MED:
    config = MEDConfig.preset("tiny", vocab_size=tokenizer().vocab_size)
    text = dataclasses.replace(config.text, dropout=dropout)
    return build_model(dataclasses.replace(config, text=text), seed=0)


def part(number: int) -> Batch:
    """Rows number * ROWS and on; no two parts share an image, some share a text."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randn(ROWS, 3, 32, 32, generator=generator)
    rows = np.random.default_rng(number).integers(0, len(TEXTS), ROWS)
    return Batch(
        pixel_values=pixels,
        captions=[TEXTS[row] for row in rows],
        image_ids=[f"{number}-{i}" for i in range(ROWS)],
    )


def joined(first: int, count: int) -> Batch:
    """Several parts as one."""
    parts = [part(first + index) for index in range(count)]
    return Batch(
        pixel_values=torch.cat([each.pixel_values for each in parts]),
        captions=[caption for each in parts for caption in each.captions],
        image_ids=[image_id for each in parts for image_id in each.image_ids],
    )


def batch(number: int) -> Batch:
    """This rank's part of batch `number`, which has 2 * ROWS rows for any number of ranks."""
    world = current_world()
    count = 2 // world.size
    return joined(2 * number + world.rank * count, count)


def run_config(**changes: object) -> TrainConfig:
    values = {"steps": 4, "batch_size": 2 * ROWS, "learning_rate": 1e-3, "queue_size": 32}
    values |= {"checkpoint_every_steps": 2, "log_every_steps": 1, "negatives_from": "all_ranks"}
    return TrainConfig(**{**values, **changes})


def gradients(
    own: Batch, world: World, **changes: object
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and losses of one batch, with a queue that already holds features."""
    words, model = tokenizer(), start()
    config = run_config(prompt="a picture of ", **changes)
    momentum = MomentumEncoders(model, 32)
    filler = torch.nn.functional.normalize(
        torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(5)), dim=2
    )
    momentum.queue.enqueue(*filler, torch.arange(24), torch.arange(24))
    forward = Forward(model, momentum, config, world, torch.device("cpu"), vision_frozen=False)
    forward.join(config)
    inputs = StepInputs.from_batch(own, words, config.prompt, config.max_text_tokens)
    torch.manual_seed(11)
    shared = torch.Generator().manual_seed(11) if world.size > 1 else None
    (weight,) = forward.lm_weights([inputs])
    losses = forward(
        inputs, distill_alpha=0.4, negative_hardness=1.0, lm_weight=weight, generator=shared
    )
    losses.total.backward()
    average_whole(model.parameters() if forward.is_sharded else [], world)
    numbers = losses.numbers()
    names = [name for name in numbers if "cosine" not in name and "accuracy" not in name]
    means = {name: float(world.mean(torch.tensor(numbers[name]))) for name in names}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: whole_tensor(grad).clone() for name, grad in grads.items()}, means


def run_two(helper: Path, folder: Path) -> None:
    """Start two ranks of a helper and wait for them; fails with what they said when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).resolve().parent.parent.parent
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world["PYTHONPATH"] = str(root)
    processes = [
        subprocess.Popen(
            [sys.executable, str(helper), str(folder)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def main(folder: Path) -> None:
    with join_world("cpu") as (world, _):
        grads, numbers = gradients(batch(0), world)
        torch.save((grads, numbers), folder / f"gradients-{world.rank}.pt")
        words = tokenizer()
        seen = []

        def reads(number: int) -> Batch:
            seen.append(number)
            return batch(number)

        model = start()
        train(model, words, reads, run_config(), folder / "plain")
        torch.save((seen, model.state_dict()), folder / f"plain-{world.rank}.pt")
        lm = run_config(objectives=("lm",), accumulate_steps=2)
        train(start(), words, batch, lm, folder / "lm")
        killed_and_resumed(folder)
        errors = []
        for size in (7, 12):
            try:
                train(start(), words, batch, run_config(batch_size=size), folder / f"odd-{size}")
            except BlipError as err:
                errors.append(str(err))
        (folder / f"odd-{world.rank}.txt").write_text("\n".join(errors))


def killed_and_resumed(folder: Path, **changes: object) -> None:
    """Train with dropout: once undisturbed, once killed and resumed, once only killed."""
    words = tokenizer()

    def dies(number: int) -> Batch:
        if number >= 3:
            raise Killed
        return batch(number)

    config, hashes = run_config(negatives_from="rank", **changes), []
    sources: list[tuple[str, Callable[[int], Batch]]] = [
        ("whole", batch),
        ("killed", dies),
        ("left", dies),
        ("killed", batch),
    ]
    for name, source in sources:
        model = start(dropout=0.1)
        try:
            train(model, words, source, config, folder / name)
        except Killed:
            continue
        hashes.append(hash_tensors(model.state_dict()))
    torch.save(hashes, folder / f"hashes-{current_world().rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
