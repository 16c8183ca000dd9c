"""An S3-compatible server on loopback, in a process of its own, and lakes on it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SERVER = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "of-the-test", "AWS_SECRET_ACCESS_KEY": "of-the-test"}
QUIET = {
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nobody is asked for credentials but the environment.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_MAX_ATTEMPTS": "2",
}


@dataclass(frozen=True)
class ObjectStore:
    """A server that keeps what it is given in memory."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return QUIET | CREDENTIALS | {"AWS_ENDPOINT_URL": self.endpoint}

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of fsspec's file system."""
        return {"endpoint_url": self.endpoint, "key": "of-the-test", "secret": "of-the-test"}


@contextmanager
def object_store(*buckets: str, checks: bool = False) -> Iterator[ObjectStore]:
    """Serve until the end of the `with`; with `checks` whoever is not known is refused, and nobody is."""
    import s3fs

    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ
        | QUIET
        | CREDENTIALS
        | ({"INITIAL_NO_AUTH_ACTION_COUNT": "0"} if checks else {}),
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        store = ObjectStore(f"http://127.0.0.1:{int(server.stdout.readline())}")
        fs = s3fs.S3FileSystem(**store.options)
        for bucket in buckets:
            fs.mkdir(bucket)
        yield store
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait()
