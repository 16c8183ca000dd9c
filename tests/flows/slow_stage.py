"""The real command with models that take their time, so that a signal meets them in the middle of a shard.

usage: slow_stage.py SECONDS COMMAND [OPTION ...]; SECONDS is what each batch takes longer.
"""

import sys
import time
from typing import Any

from blip_core import MEDCaptioner, MEDScorer
from flows.cli import main


def _slowed(original: Any, seconds: float) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments)

    return slow


if __name__ == "__main__":
    MEDCaptioner.caption = _slowed(MEDCaptioner.caption, float(sys.argv[1]))  # type: ignore[method-assign]
    MEDScorer.score = _slowed(MEDScorer.score, float(sys.argv[1]))  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
