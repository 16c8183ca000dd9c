"""Folders of a test's own that are full soon, or that nobody can write to; tests are skipped where the machine allows none."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at a folder; `grow` makes it larger."""
    folder.mkdir(parents=True, exist_ok=True)
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        yield folder


def grow(disk: Path, size: str) -> None:
    """Make a small disk larger."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write below a folder; for root, whom no mode binds, it is mounted so."""
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)
        return
    with _mounted(folder, "--bind", str(folder), str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Nobody may change, replace or remove a file."""
    if subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a file immutable here, or a file system that cannot")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@contextmanager
def _mounted(folder: Path, *arguments: str) -> Iterator[None]:
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if os.geteuid() != 0 or done.returncode != 0:
        pytest.skip("mounting needs root, and the right to do it")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
