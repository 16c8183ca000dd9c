"""Candidates: every text that a round decides on, as SQL over the parts that hold them.

Parts that are made from one shard share its name, so a few shards at a time are joined: what has to be in memory is
as small as one likes, and rows come in an order that depends on nothing but the parts. All texts of an image come together,
also those that later rows brought (`storage.guests`).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from storage import layout
from storage.guests import Guests
from storage.lake import Lake
from storage.parts_sql import rows_of
from storage.tables import PartRef, list_parts

COLUMNS = (
    "caption_id",
    "image_id",
    "source",
    "caption",
    "itm_prob",
    "itc_sim",
    "score_status",
    "score_error",
    "source_name",
    "judge_itm_prob",
    "judge_itc_sim",
)
"""What a policy may read of a text."""

CHUNK_TEXTS = 400_000
"""Texts that are decided on together: fixed, so that the same inputs give the same bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The parts that hold the texts of one round with their numbers, by shard.

    With a variant, the synthetic ones are those that another decoding wrote; the web ones are the round's, with its scores.
    """

    lake: Lake
    round: int
    shards: dict[str, dict[str, PartRef]]
    """By name of the shard: its parts, by pairs, web, synthetic, scores and, with a variant, variant_scores."""
    guests: Guests
    """Web texts that stand in another part than that of their image."""
    variant: str | None = None

    @property
    def table(self) -> str:
        """The table that decisions on these texts belong to."""
        return layout.variant_table("decisions", self.variant)

    @property
    def inputs(self) -> list[str]:
        """Fingerprints of what decisions are made from."""
        read = ("web", "synthetic", "scores", "variant_scores")
        found = (parts[kind] for parts in self.shards.values() for kind in read if kind in parts)
        return sorted(part.fingerprint for part in found)

    @property
    def judged(self) -> list[str]:
        """Fingerprints of what the judge said of the round, for policies that ask it."""
        return [part.fingerprint for part in list_parts(self.lake, "judgements", self.round)]

    def chunks(self) -> Iterator[list[str]]:
        """Shards in order, as many at a time as hold CHUNK_TEXTS."""
        names: list[str] = []
        texts = 0
        for name in sorted(self.shards):
            parts = self.shards[name]
            names.append(name)
            texts += sum(parts[kind].num_rows for kind in ("web", "synthetic") if kind in parts)
            if texts >= CHUNK_TEXTS:
                yield names
                names, texts = [], 0
        if names:
            yield names

    def sql(self, columns: Collection[str], shards: Collection[str] | None = None) -> str:
        """The texts of some shards, or of all, with the columns that are asked for.

        `source_name` costs a join with pairs, the judge's numbers one with its sample, so only who names them has
        them. A caption_id is unique.
        """
        lake, round = self.lake, self.round
        kinds = ("pairs", "web", "synthetic", "scores", "variant_scores")
        parts: dict[str, list[PartRef]] = {kind: [] for kind in kinds}
        for name in sorted(self.shards) if shards is None else shards:
            for kind, part in self.shards[name].items():
                parts[kind].append(part)
        of_scores = {"itm_prob": "itm_prob", "itc_sim": "itc_sim", "score_status": "status"}
        of_scores |= {"score_error": "error"}
        of_judge = {"judge_itm_prob": "itm_prob", "judge_itc_sim": "itc_sim"}
        picked, joins = [], []
        for column in (name for name in COLUMNS if name in columns):
            table = "s" if column in of_scores else "j" if column in of_judge else "c"
            table = "p" if column == "source_name" else table
            picked.append(f"{table}.{(of_scores | of_judge).get(column, column)} AS {column}")
        tables = {"web": "captions", "synthetic": layout.variant_table("captions", self.variant)}
        texts = {
            source: f"SELECT caption_id, image_id, source, caption "
            f"FROM ({rows_of(lake, table, parts[source])}) "
            f"WHERE source = '{source}' AND status = 'ok'"
            for source, table in tables.items()
        }
        chunk = None if shards is None else sorted(shards)
        if chunk and (guests := self.guests.texts_sql(chunk)):
            here = f"SELECT image_id FROM ({rows_of(lake, 'pairs', parts['pairs'])}) WHERE status = 'ok'"
            texts["web"] += f" AND image_id IN ({here})"
            texts["guests"] = guests
        if set(of_scores) & set(columns):
            scores = self._scores(parts, chunk)
            joins.append(
                f"LEFT JOIN ({scores}) s ON s.caption_id = c.caption_id AND s.round = {round}"
            )
        if set(of_judge) & set(columns):
            judged = rows_of(lake, "judgements", list_parts(lake, "judgements", round))
            joins.append(f"LEFT JOIN ({judged}) j ON j.caption_id = c.caption_id")
        if "source_name" in columns:
            pairs = rows_of(lake, "pairs", parts["pairs"])
            joins.append(
                "LEFT JOIN (SELECT image_id, arg_min(source_name, key) AS source_name "
                f"FROM ({pairs}) WHERE pool = 'web' AND status = 'ok' GROUP BY image_id) p "
                "ON p.image_id = c.image_id"
            )
        return f"SELECT {', '.join(picked)} FROM ({' UNION ALL '.join(texts.values())}) c {' '.join(joins)}"

    def _scores(self, parts: dict[str, list[PartRef]], chunk: list[str] | None) -> str:
        """Scores of all texts; with a variant, those of its captions take the place of the round's, text by text."""
        own = rows_of(self.lake, "scores", parts["scores"])
        if chunk and (guests := self.guests.scores_sql(chunk)):
            own = f"{own} UNION ALL BY NAME {guests}"
        if self.variant is None:
            return own
        theirs = rows_of(self.lake, "variant_scores", parts["variant_scores"])
        return (
            f"SELECT * FROM ({theirs}) UNION ALL BY NAME "
            f"SELECT * FROM ({own}) ANTI JOIN ({theirs}) USING (caption_id)"
        )


def candidates_of(lake: Lake, round: int, variant: str | None = None) -> Candidates:
    """The parts of a round's texts: what this round and those before it took in, and its synthetic ones.

    Shards are named by the round that took them in; a round decides on what it had. With a variant, the synthetic
    texts are those that another decoding wrote of the round's images.
    """
    shards: dict[str, dict[str, PartRef]] = {}
    later = layout.web_shards(round + 1)
    shards = {
        ref.name: {"pairs": ref}
        for ref in list_parts(lake, "pairs", check=True)
        if ref.name < later
    }
    for kind, table, of in (
        ("web", "captions", 0),
        ("synthetic", layout.variant_table("captions", variant), round),
        ("scores", "scores", round),
        *((("variant_scores", "variant_scores", round),) if variant else ()),
    ):
        prefix = layout.variant_part("", variant) if table.startswith("variant_") else ""
        for ref in list_parts(lake, table, of, check=True):
            name = ref.name.removeprefix(prefix)
            if ref.name.startswith(prefix) and name in shards:
                shards[name][kind] = ref
    return Candidates(
        lake=lake, round=round, shards=shards, guests=Guests(lake, shards), variant=variant
    )
