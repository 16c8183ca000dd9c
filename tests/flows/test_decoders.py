"""Decoding in threads and in processes gives the same; a process that dies costs nothing but its time."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from blip_core import EvalTransform, decode_image
from flows import decoders as module
from flows.decoders import CHUNK_IMAGES, Decoders
from flows.steps.batches import batched


def _png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Slow(EvalTransform):
    """As the one it is, after a while: time enough to be killed in."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        time.sleep(0.1)
        return super().pixels(image)


class Deadly(EvalTransform):
    """Ends the process that it runs in at pictures of one width, as a fault in a C library does."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        if image.width == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pixels(image)


class Floats:
    """A transform of somebody else's, which gives a tensor and nothing else."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((8, 6)), dtype=np.float32)).permute(2, 0, 1)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoding processes import the transforms of this file."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_decoders_give_what_each_transform_gives(importable: None, processes: bool) -> None:
    transforms = [EvalTransform(16), EvalTransform(24), Floats()]
    images = [_png(seed, (20 + seed, 30)) for seed in range(5)]
    with Decoders(transforms, workers=2, processes=processes) as decoders:
        decoded = decoders.submit(decoders.decode, [*images, b"no picture"]).result()
    assert decoded.errors[:5] == [None] * 5
    assert decoded.errors[5] is not None
    assert "not_an_image" in decoded.errors[5]
    for made, transform in zip(decoded.pixels, transforms, strict=True):
        expected = torch.stack([transform(decode_image(data)) for data in images])
        assert torch.equal(batched(list(made[:5]), transform), expected)


def test_decoding_threads_leave_the_models_threads_alone() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Decoders([EvalTransform(16)], workers=1) as decoders:
            decoders.submit(lambda: seen.append(torch.get_num_threads())).result()
            seen.append(torch.get_num_threads())
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2]


def test_decoding_process_starts_without_torch() -> None:
    code = "import flows.decode_worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_killed_decoding_process_is_replaced_and_its_images_are_decoded_again(
    importable: None,
) -> None:
    images = [_png(seed) for seed in range(CHUNK_IMAGES)]
    with Decoders([Slow(16)], workers=1, processes=True) as decoders:
        decoders.submit(decoders.decode, images[:1]).result()
        (first,) = decoders.pids
        future = decoders.submit(decoders.decode, images)
        time.sleep(0.3)
        os.kill(first, signal.SIGKILL)
        decoded = future.result()
        (second,) = decoders.pids
    assert second != first
    assert decoded.errors == [None] * CHUNK_IMAGES
    with Decoders([EvalTransform(16)], workers=1) as decoders:
        assert torch.equal(decoded.pixels[0], decoders.decode(images).pixels[0])


def test_picture_that_kills_its_process_is_the_only_one_that_fails(importable: None) -> None:
    images = [_png(seed) for seed in range(4)]
    images.insert(2, _png(9, (13, 20)))
    with Decoders([Deadly(16)], workers=1, processes=True) as decoders:
        decoded = decoders.submit(decoders.decode, images).result()
    assert decoded.errors == [None, None, "the process that decoded it died", None, None]
    kept = [0, 1, 3, 4]
    with Decoders([EvalTransform(16)], workers=1) as decoders:
        alone = decoders.decode([images[place] for place in kept])
    assert torch.equal(decoded.pixels[0][kept], alone.pixels[0])


def test_decoding_process_that_hangs_is_taken_for_dead(
    importable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)
    with Decoders([Slow(16)], workers=1, processes=True) as decoders:
        decoded = decoders.submit(decoders.decode, [_png(0)]).result()
    assert decoded.errors == ["the process that decoded it died"]


def test_close_ends_the_processes_in_the_middle_of_their_work(importable: None) -> None:
    decoders = Decoders([Slow(16)], workers=2, processes=True)
    images = [_png(seed) for seed in range(CHUNK_IMAGES)]
    futures = [decoders.submit(decoders.decode, images) for _ in range(8)]
    while len(decoders.pids) < 2:
        time.sleep(0.01)
    pids = decoders.pids
    decoders.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert all(future.cancelled() or future.exception() for future in futures)


def test_decoding_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from blip_core import EvalTransform\n"
        "from flows.decoders import Decoders\n"
        "decoders = Decoders([EvalTransform(16)], workers=1, processes=True)\n"
        "decoders.submit(decoders.decode, [b'']).result()\n"
        "sys.stdout.write(f'{decoders.pids[0]}\\n')\n"
        "sys.stdout.flush()\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=10)
