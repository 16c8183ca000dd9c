"""One run at a time: an flock on a local disk, a renewed object on a store."""

import fcntl
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from storage.errors import LakeBusy, StorageError
from storage.fs import TMP_PREFIX, Root, explained

logger = logging.getLogger(__name__)

HEARTBEAT_S = 60.0
"""How often the holder of a remote lock renews it."""

STALE_AFTER_S = 600.0
"""A remote lock not renewed for so long belongs to nobody."""


@contextmanager
def hold_local(root: Root, rel: str, purpose: str, what: str = "lake") -> Iterator[int | None]:
    """Hold an flock; the file says who holds it. The file stays, the lock does not.

    Gives the file's descriptor: a process that inherits it holds the lock too.
    """
    path = root.local_path(rel)
    assert path is not None, "hold_local needs a local root"
    with explained(root, rel):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise _busy(root, os.pread(fd, 4096, 0), what) from err
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(_holder(purpose)).encode(), 0)
        yield fd
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


@contextmanager
def hold_remote(root: Root, rel: str, purpose: str, what: str = "lake") -> Iterator[int | None]:
    """Hold a lock object that a thread renews.

    Object stores offer no portable exclusive create, so the holder writes its token, waits and
    reads it back: of two that start within that second, at most one goes on.
    """
    holder = _holder(purpose) | {"token": uuid.uuid4().hex}
    current = _read(root, rel)
    if current is not None:
        silent_s = _silent_s(root, rel)
        if silent_s < STALE_AFTER_S:
            raise _busy(root, json.dumps(current).encode(), what, _if_killed(root, rel, silent_s))
    _write(root, rel, holder)
    time.sleep(0.0 if root.uri.startswith("memory:") else 1.0)
    current = _read(root, rel)
    if current is None or current.get("token") != holder["token"]:
        raise _busy(root, json.dumps(current).encode(), what)
    stop = threading.Event()
    beat = threading.Thread(target=_renew, args=(root, rel, holder, stop), daemon=True, name="lock")
    beat.start()
    try:
        yield None
    finally:
        stop.set()
        beat.join()
        last = _read(root, rel)
        if last is not None and last.get("token") == holder["token"]:
            root.remove(rel)


def _renew(root: Root, rel: str, holder: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            now = _read(root, rel)
            if now is not None and now.get("token") != holder["token"]:
                # This process stood still for so long that somebody else took over.
                logger.error("the lock of %s was lost to %s", root.uri, now.get("purpose"))
                return
            _write(root, rel, holder)
        except (StorageError, OSError) as err:
            logger.warning("could not renew the lock of %s: %s", root.uri, err)


def _holder(purpose: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "purpose": purpose,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write(root: Root, rel: str, holder: dict[str, Any]) -> None:
    root.write_bytes(rel, json.dumps(holder).encode())


def _silent_s(root: Root, rel: str) -> float:
    """For how long nobody has written a lock object, in s.

    By the store's own clock: those of the machines that share a lake need not agree, nor go steadily.
    """
    probe = str(PurePosixPath(rel).with_name(f"{TMP_PREFIX}{uuid.uuid4().hex}"))
    root.write_bytes(probe, b"")
    try:
        return (root.modified(probe) - root.modified(rel)).total_seconds()
    except FileNotFoundError:
        return math.inf  # given back meanwhile
    finally:
        root.remove(probe)


def _read(root: Root, rel: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(root.read_bytes(rel))
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _if_killed(root: Root, rel: str, silent_s: float) -> str:
    return (
        f". If it was killed, nobody gives the lock back: it is free {STALE_AFTER_S:.0f} s after it was last renewed, in "
        f"{STALE_AFTER_S - silent_s:.0f} s, and the same command goes on then. Or remove {root.uri}/{rel}, if you are sure "
        "that nothing of that run is alive, and it goes on at once"
    )


def _busy(root: Root, record: bytes, what: str, if_killed: str = "") -> LakeBusy:
    try:
        who = json.loads(record)
        text = (
            f"{who['purpose']!r}, process {who['pid']} on {who['host']}, since {who['started_at']}"
        )
    except (ValueError, KeyError, TypeError):
        text = "a run that is just starting"
    return LakeBusy(
        f"{what} {root.uri} is in use by {text}; wait for it to end or stop it, or name another "
        f"{what}{if_killed}"
    )
