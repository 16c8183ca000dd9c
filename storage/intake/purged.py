"""What was purged is not taken in again: its bytes, its addresses, and the hosts that were asked to stay away from."""

from pathlib import Path
from types import TracebackType
from typing import Any

from storage import addresses, ids
from storage.intake.seen import SeenImages
from storage.lake import Lake
from storage.schemas import PURGED_STATUS
from storage.tables import iter_part, list_parts

_ABOUT_THE_IMAGE = ("alt_text", "licence", "extra")
"""Columns of a pair that say something of its image, and go with it."""


_HOST = "host "


def _address_id(address: str) -> str:
    return ids.joined_id("address", address)


def has_purges(lake: Lake) -> bool:
    """Whether anything was ever purged from a lake."""
    return bool(list_parts(lake, "purged"))


class PurgedImages:
    """Images that were purged, on disk, with the reasons."""

    def __init__(self, lake: Lake, folder: Path) -> None:
        self._seen = SeenImages(folder)
        self._hosts: dict[str, str] = {}
        for ref in list_parts(lake, "purged"):
            for batch in iter_part(lake, ref, ["image_id", "because", "address", "asked"]):
                for row in batch.to_pylist():
                    self._remember(row)

    def __enter__(self) -> "PurgedImages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seen.__exit__(kind, err, trace)

    def _remember(self, row: dict[str, Any]) -> None:
        if row["image_id"] is not None:
            self._seen.add(row["image_id"], row["because"])
        if row["address"] is not None:
            self._seen.add(_address_id(row["address"]), row["because"])
        if row["asked"].startswith(_HOST):
            self._hosts[row["asked"].removeprefix(_HOST)] = row["because"]

    def outcome_of_address(self, url: str) -> dict[str, Any] | None:
        """The same of an address that was purged, or whose host was."""
        address, host = addresses.normal(url), addresses.host_of(url)
        because = None if address is None else self._seen.place(_address_id(address))
        steps = (host or "").split(".")
        hosts = (".".join(steps[n:]) for n in range(len(steps)))
        because = because or next((self._hosts[h] for h in hosts if h in self._hosts), None)
        if because is None:
            return None
        return {"status": PURGED_STATUS, "reason": because} | dict.fromkeys(_ABOUT_THE_IMAGE)

    def outcome(self, image_id: str) -> dict[str, Any] | None:
        """Of an image that was purged, what its row of `pairs` says in place of what the list says; None of any other."""
        because = self._seen.place(image_id)
        if because is None:
            return None
        said = {"status": PURGED_STATUS, "reason": because, "image_id": image_id}
        return said | dict.fromkeys(_ABOUT_THE_IMAGE)
