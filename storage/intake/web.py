"""URL lists into the lake: planned, fetched by img2dataset, packed into shards, one row each.

A list goes through in slices, a slice in parts of `shard_rows` rows; a part is packed while others are fetched.
A part is one shard with its pairs and its web captions, made from what was fetched; when it is committed it is never
fetched again. Killed anywhere, the same call goes on where it was and ends with the same tables, all but
the column fetched_at.
"""

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import fsspec

from storage import layout
from storage.catalog import disk_watched
from storage.errors import ConfigError, EmptyInput
from storage.fingerprint import Basis, basis_of, explain, fingerprint_of
from storage.intake.download_config import DownloadConfig
from storage.intake.fetching.host_server import HostServer
from storage.intake.judged import safe_rows
from storage.intake.known import KnownImages
from storage.intake.looking import OF_THE_IMAGE, Lookers, read_fetched
from storage.intake.passes import PassResults
from storage.intake.plan import Plan, make_plan
from storage.intake.purged import PurgedImages
from storage.intake.records import (
    IntakeRecord,
    finished_intake,
    num_ok_of,
    outcomes_of,
    remember_intake,
)
from storage.intake.slices import SliceFetching
from storage.intake.texts import WebTexts, counts_of_texts
from storage.intake.url_list import UrlListConfig, list_files
from storage.lake import Lake
from storage.schemas import OK
from storage.shards import Sample, write_shard
from storage.store_errors import store_named
from storage.tables import (
    Clock,
    Counts,
    OnStale,
    PartRef,
    commit_part,
    committed_part,
    drop_part,
    list_parts,
    part_manifest,
    rows_table,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 2
"""2: robots.txt, checked addresses, further passes; dns, tls, too_slow, too_many_pixels, robots, blocked_address."""

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


def ingest_urls(
    lake: Lake,
    url_list: UrlListConfig,
    config: DownloadConfig,
    *,
    round: int,
    position: int = 0,
    on_stale: OnStale = "error",
    on_progress: Progress | None = None,
) -> list[PartRef]:
    """Bring a list of URLs into the lake as this round's; its pairs parts, then its captions parts.

    `position` tells the lists of a round apart, from 0. Rows that the lake has from an earlier
    list or round are skipped, unless they failed in a way that may pass (`ask_again_rounds`); with nothing new the
    answer is [].
    Raises MissingColumn, EmptyInput (an empty list, or no image in the whole lake afterwards),
    StaleOutput (this round took in something else), IntakeError, StorageFull.
    """
    intake = _Intake(lake, url_list, config, layout.web_shards(round, position), on_stale)
    record = f"web-{position:02d}"
    done = finished_intake(lake, round, record, intake.basis, on_stale)
    if done is not None:
        return list(done.parts)
    intake.drop_outdated()
    folder = lake.scratch("ingest", fingerprint_of(intake.basis))
    with disk_watched(lake, layout.WORK):
        plan = make_plan(
            lake,
            url_list,
            intake.earlier,
            folder,
            placeholder_most=config.placeholder_most,
            again=config.ask_again_rounds,
        )
        parts = intake.run(plan, folder, on_progress)
    # What failed before may well fail again.
    num_new = _num_asked(lake, parts) - plan.num_again()
    if num_ok_of(lake, parts) == 0 and (num_new > 0 or not intake.earlier):
        raise EmptyInput(
            f"{url_list.path}: none of its {plan.num_rows} URLs gave an image "
            f"({outcomes_of(lake, parts)}); check the network, the proxy and the list, then run the "
            "same command again: they are fetched anew"
        )
    remember_intake(lake, round, record, IntakeRecord(basis=intake.basis, parts=tuple(parts)))
    # What runs with other settings left behind goes too.
    shutil.rmtree(lake.scratch("ingest"), ignore_errors=True)
    return parts


class _Intake:
    """One intake: its settings, and what the lake has already."""

    def __init__(
        self,
        lake: Lake,
        url_list: UrlListConfig,
        config: DownloadConfig,
        source: str,
        on_stale: OnStale,
    ) -> None:
        self.lake, self.config, self.on_stale = lake, config, on_stale
        self.source = source
        everything = [p for p in list_parts(lake, "pairs") if p.name.startswith("web-")]
        self.own = [p for p in everything if p.name.startswith(f"{source}-")]
        # Names sort by round and position: what comes after this list is none of its business.
        self.earlier = [p for p in everything if p.name < source]
        settings = config.data_settings() | {
            "name": url_list.name,
            "columns": url_list.as_basis(),
        }
        inputs = [f"list {_list_sha256(url_list.path)}", *(p.fingerprint for p in self.earlier)]
        self.basis: Basis = basis_of("ingest_urls", STAGE_VERSION, settings, inputs)

    def drop_outdated(self) -> None:
        """Forget what this round took in before, when it was all dead or is to be rebuilt."""
        bases = [part_manifest(self.lake, ref).basis for ref in self.own]
        changed = any(explain(b.get("intake", {}), self.basis) for b in bases)
        dead = self.own and num_ok_of(self.lake, self.own) == 0
        if dead or (changed and self.on_stale == "rebuild"):
            texts = list_parts(self.lake, "captions", 0)
            for ref in [*self.own, *(t for t in texts if t.name.startswith(f"{self.source}-"))]:
                drop_part(self.lake, ref)
            self.own = []

    def run(self, plan: Plan, folder: Path, on_progress: Progress | None) -> list[PartRef]:
        """All parts, slice by slice; the pairs first, then the captions."""
        pairs: list[PartRef] = []
        captions: list[PartRef] = []
        with (
            KnownImages(self.lake, folder, self.config) as known,
            PurgedImages(self.lake, folder) as purged,
            HostServer(self.config.host_rules, patience_s=self.config.turn_patience_s) as hosts,
            Lookers(self.config) as self._lookers,
        ):
            self._texts = WebTexts(self.config, known.images, purged)
            for ref in self.earlier:
                texts = committed_part(self.lake, "captions", ref.name, round=0)
                known.remember(ref, texts, own=False)
            fetching = SliceFetching(plan, folder, self.config, hosts.address, self._is_missing)
            with closing(fetching.parts(on_progress)) as parts:
                for index, fetched in parts:
                    made = self._part(plan, index, fetched, known, purged)
                    pairs.append(made[0])
                    captions.append(made[1])
        return [*pairs, *captions]

    def _is_missing(self, index: int) -> bool:
        return self._committed(index) is None

    def _committed(self, index: int) -> tuple[PartRef, PartRef] | None:
        """Both parts of a shard when they are committed, StaleOutput when from something else."""
        name, basis = layout.part_name(self.source, index), self._part_basis(index)
        stale: OnStale = self.on_stale
        pairs = committed_part(self.lake, "pairs", name, basis=basis, on_stale=stale)
        texts = committed_part(self.lake, "captions", name, round=0, basis=basis, on_stale=stale)
        return (pairs, texts) if pairs is not None and texts is not None else None

    def _part_basis(self, index: int) -> Basis:
        return self.basis | {"intake": self.basis, "part": index}

    def _part(
        self,
        plan: Plan,
        index: int,
        fetched: PassResults | None,
        known: KnownImages,
        purged: PurgedImages,
    ) -> tuple[PartRef, PartRef]:
        """One shard with its pairs and captions, unless it is committed."""
        made = self._committed(index)
        if made is not None:
            known.remember(*made, own=True)
            return made
        assert fetched is not None, f"part {index} is missing, but nothing was fetched"
        clock = Clock()
        name = layout.part_name(self.source, index)
        begin, end = index * self.config.shard_rows, (index + 1) * self.config.shard_rows
        planned = plan.rows(begin, end)
        pairs: list[dict[str, Any]] = []
        samples = self._samples(planned, fetched, known, purged, pairs)
        _, ranges = write_shard(self.lake, name, samples)
        where = {r.key: r.offset for r in ranges}
        for pair in pairs:
            if pair["status"] == OK:
                pair |= {"shard": name, "offset": where[pair["key"]]}
        self._texts.unite(pairs, planned)
        captions = self._texts.captions(pairs, planned)
        refs = self._commit(name, index, pairs, captions, clock)
        known.made(pairs, captions)
        return refs

    def _samples(
        self,
        planned: list[dict[str, Any]],
        results: PassResults,
        known: KnownImages,
        purged: PurgedImages,
        pairs: list[dict[str, Any]],
    ) -> Iterator[Sample]:
        """The images of a shard; a row for each planned row is put into `pairs`."""
        looked = self._lookers.looked_at(
            planned,
            read=partial(read_fetched, results=results),
            num_bytes=lambda row: results.num_bytes(row["n"]),
        )
        for row in safe_rows((each for _, each in looked), self.config.safety):
            pair = row.pair
            pairs.append(pair)
            if row.image is None or row.looks is None:
                continue
            gone = purged.outcome(pair["image_id"])
            if gone is not None:
                pair |= dict.fromkeys(OF_THE_IMAGE) | gone
                continue
            refused = known.refusal(pair["image_id"], pair["key"], row.looks)
            if refused is not None:
                pair |= {"status": refused[0], "reason": refused[1]}
                continue
            pair["size"] = len(row.image)
            meta = {k: pair[k] for k in ("url", "alt_text", "source_name", "image_id")}
            yield Sample(key=pair["key"], image=row.image, ext=row.ext, meta=meta)

    def _commit(
        self,
        name: str,
        index: int,
        pairs: list[dict[str, Any]],
        captions: list[dict[str, Any]],
        clock: Clock,
    ) -> tuple[PartRef, PartRef]:
        """The captions first: a shard counts as done when its pairs are committed too."""
        basis = self._part_basis(index)
        texts = commit_part(
            self.lake,
            "captions",
            name,
            rows_table("captions", captions),
            round=0,
            basis=basis,
            counts=counts_of_texts(pairs, captions),
            clock=clock,
        )
        num_ok = sum(pair["status"] == OK for pair in pairs)
        reasons = Counter(pair["status"] for pair in pairs if pair["status"] != OK)
        counts = Counts(num_in=len(pairs), num_ok=num_ok, reasons=dict(sorted(reasons.items())))
        table = rows_table("pairs", pairs)
        made = commit_part(self.lake, "pairs", name, table, basis=basis, counts=counts, clock=clock)
        return made, texts


def _num_asked(lake: Lake, parts: list[PartRef]) -> int:
    """Rows that were asked for: a list of nothing but known addresses is no failure."""
    known = (
        *("duplicate_url", "duplicate_image", "near_duplicate", "eval_overlap"),
        *("bad_text", "bad_url", "purged"),
    )
    manifests = [part_manifest(lake, ref) for ref in parts if ref.table == "pairs"]
    return sum(m.num_in - sum(m.reasons.get(name, 0) for name in known) for m in manifests)


def _list_sha256(path: str) -> str:
    """First 32 hex digits of the hash of the list's bytes; ConfigError when it is not there."""
    hashes = [_file_sha256(file) for file in list_files(path)]
    if len(hashes) == 1:
        return hashes[0][:32]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]


def _file_sha256(path: str) -> str:
    try:
        with store_named(path), fsspec.open(path, "rb") as f:
            return hashlib.file_digest(cast(Any, f), "sha256").hexdigest()
    except FileNotFoundError as err:
        raise ConfigError(f"{path} does not exist; check the path of the URL list") from err
    except (PermissionError, IsADirectoryError) as err:
        raise ConfigError(f"{path} cannot be read: {err}; name a readable file") from err
