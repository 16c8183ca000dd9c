"""One export: chosen, written piece by piece, described, read back, committed."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from storage.errors import ConfigError, CorruptData, EmptyInput
from storage.exports import choice
from storage.exports.blip_json import BlipJson
from storage.exports.card import card
from storage.exports.coco_json import CocoJson
from storage.exports.croissant import croissant
from storage.exports.facts import gather
from storage.exports.format import Captions, DamagedExport, Format, Plan
from storage.exports.hf_parquet import HFParquet
from storage.exports.id_list import IdList
from storage.exports.pieces import Piece, json_line
from storage.exports.selection import Selection, select
from storage.exports.target import (
    CARD,
    CROISSANT,
    LEDGER,
    LOST,
    File,
    PieceRecord,
    Target,
    piece_record,
)
from storage.exports.webdataset import WebDataset
from storage.fingerprint import Basis, basis_of
from storage.lake import Lake
from storage.tables import OnStale, PartRef

logger = logging.getLogger(__name__)

STAGE_VERSION = 1

FORMATS: dict[str, Format] = {
    form.name: form for form in (WebDataset(), HFParquet(), BlipJson(), CocoJson(), IdList())
}

Progress = Callable[[str, int, int], None]
"""Told `export` or `check`, and how many images of how many are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a clean set is exported."""

    format: str
    with_human: bool = False
    """Whether pairs that people captioned go along."""
    captions: Captions | None = None
    """Several texts of an image: a sample for each, or one with a list; as the format does when None."""
    shard_images: int = 10_000
    """Images of a tar, a Parquet file, or a step that is resumed."""
    csv: bool = False
    """Format ids: CSV in place of Parquet."""
    name: str | None = None
    """Name of the data set in its card; else made of policy and round."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.format not in FORMATS:
            raise ConfigError(
                f"format {self.format!r} is unknown; there are {', '.join(sorted(FORMATS))}"
            )
        if self.shard_images < 1:
            raise ConfigError(f"shard_images must be 1 or more, got {self.shard_images}")
        can = FORMATS[self.format].captions
        if self.captions is not None and self.captions not in can:
            raise ConfigError(
                f"format {self.format} has captions {' or '.join(can)}, not {self.captions}"
            )
        if self.csv and self.format != "ids":
            raise ConfigError(f"csv is for the format ids; {self.format} has one form")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export holds."""

    uri: str
    round: int
    policy: str
    generation: str
    num_images: int
    num_texts: int
    num_lost: int
    """Images that were kept and could not be read; `not_exported.jsonl` names them."""
    was_there: bool
    """Whether it had been finished before."""
    verified: bool


def export(
    lake: Lake,
    uri: str,
    options: Options,
    *,
    round: int | None = None,
    policy: str | None = None,
    params: Mapping[str, Any] | None = None,
    verify: bool = True,
    on_stale: OnStale = "error",
    on_progress: Progress | None = None,
) -> Exported:
    """Write what a policy keeps in a round (by default the last decided one) to a folder.

    For `policy` and `params` see `choice.decided_part`. The same call goes on where a killed one ended and gives
    the same bytes. Raises EmptyInput when nothing is kept, ConfigError when the target holds something
    else, StaleOutput when it holds another export, CorruptData when what was written is not what is read back.
    """
    round = choice.last_decided(lake) if round is None else round
    part = _decision(lake, round, policy, params)
    reader = Lake(lake.root, lake.lake_id, read_only=True, scratch_root=lake.scratch_root)
    with select(reader, round, part, options.with_human) as selection:
        if selection.num_texts == 0:
            raise EmptyInput(
                f"decision {part.name} of round {round} keeps no text that may leave the lake "
                f"{lake.uri}; look at the views `funnel` and `rejected`, or name another policy"
            )
        form = FORMATS[options.format]
        plan = Plan(
            num_pieces=-(-selection.num_images // options.shard_images),
            captions=options.captions or form.captions[0],
            csv=options.csv,
            licences=tuple(sorted(n for n, _, _ in selection.counted("licence") if n is not None)),
        )
        basis = _basis(reader, round, part, selection, options, plan)
        work = Work(reader, Target(uri, basis, form.contents(plan)), form, plan, selection, part)
        return work.run(verify, on_stale, on_progress)


class Work:
    """An export under way."""

    def __init__(
        self,
        lake: Lake,
        target: Target,
        form: Format,
        plan: Plan,
        selection: Selection,
        part: PartRef,
    ) -> None:
        self.lake = lake
        self.part = part
        self.target = target
        self.form = form
        self.plan = plan
        self.selection = selection

    def run(self, verify: bool, on_stale: OnStale, on_progress: Progress | None) -> Exported:
        """Write what is not there yet, try again what could not be read; check all of it."""
        self.target.check(on_stale)
        with self.target.held():
            was_there = self.target.check(on_stale)
            if was_there:
                record = self.target.done()
                pieces = [piece_record(piece) for piece in record["pieces"]]
                files = [File(**file) for file in record["files"]]
                lost = {piece.index for piece in pieces if piece.lost}
                if lost:
                    self.target.reopen(pieces, lost)
                    was_there = False
            if not was_there:
                self.target.begin()
                pieces = self._pieces(on_progress)
                files = self._finish(pieces)
            if verify:
                self._verified(pieces, files, on_progress)
            if not was_there:
                self.target.finish(self._record(pieces, files))
        return self._exported(pieces, was_there, verify)

    def _pieces(self, on_progress: Progress | None) -> list[PieceRecord]:
        """Every piece: found, or written now."""
        size, done, images, texts = self.target.basis["config"]["shard_images"], [], 0, 0
        stream = self.selection.images()
        for index in range(self.plan.num_pieces):
            picked = list(itertools.islice(stream, size))
            record = self.target.piece(index)
            # Numbers in a JSON go on from the piece before; what was lost may have been restored.
            if record is None or record.lost or record.first_image != images:
                piece = Piece(
                    lake=self.lake, index=index, images=picked, first_image=images, first_text=texts
                )
                record = self._write(piece)
            done.append(record)
            images, texts = images + record.num_images, texts + record.num_texts
            if on_progress is not None:
                on_progress("export", index * size + len(picked), self.selection.num_images)
        if images == 0:
            raise CorruptData(
                f"none of the {self.selection.num_images} images can be read, so there is nothing "
                f"to export; the first: {done[0].lost[0]['reason']}"
            )
        return done

    def _write(self, piece: Piece) -> PieceRecord:
        self.target.forget_piece(piece.index)
        files = self.form.write_piece(self.target, piece, self.plan)
        lost = tuple(
            piece.lost[picked.image_id] for picked in piece.images if picked.image_id in piece.lost
        )
        record = PieceRecord(
            index=piece.index,
            first_image=piece.first_image,
            num_images=len(piece.written),
            num_texts=sum(len(picked.texts) for picked in piece.written),
            files=tuple(files),
            lost=lost,
        )
        self.target.finish_piece(record)
        return record

    def _finish(self, pieces: Sequence[PieceRecord]) -> list[File]:
        """What stands for all pieces; every file of the export."""
        files = [file for piece in pieces for file in piece.files]
        files = [file for file in files if not file.path.startswith(LEDGER)]
        files += self.form.finish(self.target, pieces, self.selection, self.plan)
        lost = [json_line(row) + "\n" for piece in pieces for row in piece.lost]
        if lost:
            files += self.target.write_text(LOST, "".join(lost))
        else:
            self.target.root.remove(LOST)
        facts = gather(
            self.lake, self.part, self.target, self.plan, self.selection, pieces, list(files)
        )
        files += self.target.write_text(CARD, card(facts))
        files += self.target.write_text(CROISSANT, croissant(facts))
        return files

    def _record(self, pieces: Sequence[PieceRecord], files: Sequence[File]) -> dict[str, Any]:
        kept = [[f for f in p.files if not f.path.startswith(LEDGER)] for p in pieces]
        return {
            "num_images": sum(piece.num_images for piece in pieces),
            "num_texts": sum(piece.num_texts for piece in pieces),
            "num_lost": sum(len(piece.lost) for piece in pieces),
            "files": [asdict(file) for file in files],
            "pieces": [asdict(p) | {"files": f} for p, f in zip(pieces, _plain(kept), strict=True)],
        }

    def _verified(
        self, pieces: Sequence[PieceRecord], files: Sequence[File], on_progress: Progress | None
    ) -> None:
        """`_verify`; what is found damaged is to be made anew by the same command."""
        try:
            self._verify(pieces, files, on_progress)
        except DamagedExport as err:
            listing = {p.index for p in pieces if err.path in {file.path for file in p.files}}
            everywhere = err.path not in {file.path for file in files}
            self.target.reopen(pieces, {p.index for p in pieces} if everywhere else listing)
            raise

    def _verify(
        self, pieces: Sequence[PieceRecord], files: Sequence[File], on_progress: Progress | None
    ) -> None:
        """Every file has its hash, every image its id, and the numbers are those that were written."""
        for file in files:
            try:
                found = self.target.sha256(file.path)
            except FileNotFoundError as err:
                raise DamagedExport(self.target, file.path, "is gone") from err
            if found != file.sha256:
                raise DamagedExport(self.target, file.path, "has other bytes than were written")
        wanted = (sum(p.num_images for p in pieces), sum(p.num_texts for p in pieces))
        images = texts = 0
        for more_images, more_texts in self.form.read_back(self.target, pieces, self.plan):
            images, texts = images + more_images, texts + more_texts
            if on_progress is not None:
                on_progress("check", images, wanted[0])
        if (images, texts) != wanted:
            raise DamagedExport(
                self.target,
                self.form.name,
                f"gives {images} images and {texts} texts when read back, {wanted[0]} and {wanted[1]} were written",
            )

    def _exported(self, pieces: Sequence[PieceRecord], was_there: bool, verify: bool) -> Exported:
        config = self.target.basis["config"]
        return Exported(
            uri=self.target.uri,
            round=config["round"],
            policy=config["policy"],
            generation=config["generation"],
            num_images=sum(piece.num_images for piece in pieces),
            num_texts=sum(piece.num_texts for piece in pieces),
            num_lost=sum(len(piece.lost) for piece in pieces),
            was_there=was_there,
            verified=verify,
        )


def _decision(
    lake: Lake, round: int, policy: str | None, params: Mapping[str, Any] | None
) -> PartRef:
    """The decision to follow; the lake is held only when one has to be made."""
    found = choice.found_part(lake, round, policy, params)
    if found is not None:
        return found
    with lake.lock("export: decide"):
        return choice.decided_part(lake, round, policy, params)


def _basis(
    lake: Lake, round: int, part: PartRef, selection: Selection, options: Options, plan: Plan
) -> Basis:
    config = {
        "format": options.format,
        "captions": plan.captions,
        "csv": plan.csv,
        "with_human": options.with_human,
        "shard_images": options.shard_images,
        "name": options.name,
        "round": round,
        **choice.described(lake, part),
        "num_images": selection.num_images,
        "num_texts": selection.num_texts,
        "rows": selection.digest,
    }
    return basis_of("export", STAGE_VERSION, config, [part.fingerprint])


def _plain(files: Sequence[Sequence[File]]) -> list[list[dict[str, Any]]]:
    return [[asdict(file) for file in some] for some in files]
