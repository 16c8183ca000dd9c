"""Purges: images taken out of a lake for good, on request, with proof.

`request` says what is meant, `matching` which rows that is, `plan` what it would take out, `run` does it, `proof` reads it
all back.
"""

from storage.purge.plan import Found, Plan, find
from storage.purge.proof import Proof, images_of
from storage.purge.request import Request, asked_host, asked_image, asked_url, read_list
from storage.purge.run import Around, Purged, purge, resume

__all__ = [
    "Around",
    "Found",
    "Plan",
    "Proof",
    "Purged",
    "Request",
    "asked_host",
    "asked_image",
    "asked_url",
    "find",
    "images_of",
    "purge",
    "read_list",
    "resume",
]
