"""Purge, and kill this very process with SIGKILL just before or just after its N-th move on the lake.

usage: purge_killer.py before|after N LAKE HOST. A move is a file that appears under its name, a small file written, or a
removal. Ends with status 0 when the purge has fewer moves, and says how many.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHEN, NTH, URI, HOST = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
moves = 0


def counted(move: Callable[..., Any]) -> Callable[..., Any]:
    def moved(*arguments: Any, **named: Any) -> Any:
        global moves
        moves += 1
        if moves == NTH and WHEN == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = move(*arguments, **named)
        if moves == NTH and WHEN == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return moved


def main() -> None:
    from purge_world import around

    from storage import Lake, fs
    from storage.purge import Request, asked_host, purge

    fs._publish = counted(fs._publish)
    fs.Root.remove = counted(fs.Root.remove)  # type: ignore[method-assign]
    request = Request(asked=(asked_host(HOST),), because="killed again and again")
    purge(Lake.open(URI), request, around())
    sys.stdout.write(str(moves))


main()
