"""Pictures are looked at in several processes, which may die."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fatal_look_worker import FATAL
from web_world import jpeg

from storage.intake import looking
from storage.intake.download_config import DownloadConfig
from storage.intake.images import inspect_image
from storage.intake.looking import AHEAD, CHUNK_ROWS, FEW, Lookers

CONFIG = DownloadConfig(min_image_side_px=8)
PICTURES = [jpeg(seed, side_px=24) for seed in range(10)]
NUM = FEW + 2 * CHUNK_ROWS * (AHEAD + 2)


def rows_of(lookers: Lookers, images: list[bytes | None]) -> Iterator[tuple[int, looking.Looked]]:
    def read(row: int) -> tuple[dict[str, Any], bytes | None]:
        return {"row": row, "status": None if images[row] else "timeout"}, images[row]

    return lookers.looked_at(range(len(images)), read, lambda row: len(images[row] or b""))


def outcomes(looked: list[tuple[int, looking.Looked]]) -> list[str]:
    return [each.pair["status"] for _, each in looked]


def test_rows_come_in_order_with_what_their_pictures_show_whoever_looked() -> None:
    images = [PICTURES[n % 10] + n.to_bytes(4, "big") for n in range(NUM)]
    given = [
        None if n % 7 == 0 else b"no picture" if n % 11 == 0 else images[n] for n in range(NUM)
    ]
    with Lookers(CONFIG) as lookers:
        looked = list(rows_of(lookers, given))
        assert 1 <= len(lookers.pids) <= looking.WORKERS
    assert (
        [row for row, _ in looked] == [each.pair["row"] for _, each in looked] == list(range(NUM))
    )
    for row, each in looked:
        if row % 7 == 0:
            assert (each.pair["status"], each.image) == ("timeout", None)
        elif row % 11 == 0:
            assert (each.pair["status"], each.image) == ("not_an_image", None)
        else:
            shown = inspect_image(images[row], 8, CONFIG.max_image_pixels).looks
            assert shown is not None
            assert each.looks is not None
            assert each.looks.to_bytes() == each.pair["looks"] == shown.to_bytes()
            assert (each.image, each.pair["width"]) == (images[row], 24)


def test_little_to_look_at_starts_no_process() -> None:
    with Lookers(CONFIG) as lookers:
        assert outcomes(list(rows_of(lookers, [*PICTURES] * 2))) == ["ok"] * 20
        assert lookers.pids == []


def test_process_that_is_killed_is_replaced_and_all_end_with_the_lookers() -> None:
    with Lookers(CONFIG) as lookers:
        looked = []
        killed: list[int] = []
        for each in rows_of(lookers, [PICTURES[n % 10] for n in range(NUM)]):
            looked.append(each)
            if not killed and lookers.pids:
                killed = lookers.pids[:1]
                os.kill(killed[0], signal.SIGKILL)
        pids = lookers.pids
        assert killed
        assert not set(killed) & set(pids)
    assert outcomes(looked) == ["ok"] * NUM
    assert not any(psutil.pid_exists(pid) for pid in [*killed, *pids])


def test_picture_that_brings_its_process_down_is_the_only_one_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.setattr(looking, "WORKER", "fatal_look_worker")
    images: list[bytes | None] = [PICTURES[n % 10] for n in range(2 * FEW)]
    images[FEW + 20] = PICTURES[0] + FATAL
    with Lookers(CONFIG) as lookers:
        looked = list(rows_of(lookers, images))
    expected = ["ok"] * (2 * FEW)
    expected[FEW + 20] = "decode_error"
    assert outcomes(looked) == expected
    assert looked[FEW + 20][1].pair["reason"] == "brings the decoder down"


def test_processes_end_with_a_parent_that_is_killed() -> None:
    code = (
        "import sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_looking import CONFIG, NUM, PICTURES, Lookers, rows_of\n"
        "with Lookers(CONFIG) as lookers:\n"
        "    list(rows_of(lookers, [PICTURES[n % 10] for n in range(NUM)]))\n"
        "    print(*lookers.pids, flush=True)\n"
        "    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
