"""A clean set as others read it: tars, Parquet, JSON or bare ids, with a card that says what it is.

Start with `run.export`. `choice` finds the decision, `selection` the texts, `target` the folder;
one file writes and reads back each format; `card` and `croissant` describe the result.
"""

from storage.exports.run import Exported, Options, export

__all__ = ["Exported", "Options", "export"]
