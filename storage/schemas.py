"""The tables: one schema each, one comment for every column.

Ids are 32 hex digits. A status of `ok` means that the row goes on; any other status comes with
a reason. `round` is also in the path of a part; readers use the column.
"""

import pyarrow as pa

SCHEMA_VERSION = 1
"""Written to lake.json; a lake of another version is refused.

A column that is only added leaves it as it is: older parts have null there (`ADDED_LATER`), and an
older program does not ask for it.
"""

OK = "ok"

PURGED_STATUS = "purged"
"""Status of an input row whose image was taken out on request, or is not taken in because one was."""

SOURCES = ("web", "synthetic", "human")
"""Who proposed a caption: the alt text, a captioner, a person (T_w, T_s, T_h of the paper)."""

PROTOCOLS = ("zero-shot", "finetuned")
"""How a model met the held-out set: as it was pretrained, or finetuned for the task (paper, 5.1)."""

POOLS = ("web", "human", "heldout")
"""What a pair may be used for: filtered, trusted, or only for evaluation."""


def _column(name: str, kind: pa.DataType, comment: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"comment": comment})


_TEXT, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")

PAIRS = pa.schema(
    [
        _column("key", _TEXT, "id of the input row: source_name, url, alt_text", False),
        _column("pool", _TEXT, "web, human or heldout", False),
        _column("row", _INT, "position in its list, from 0", False),
        _column("source_name", _TEXT, "where the row came from, as the user names it", False),
        _column("url", _TEXT, "address as given; for human pairs the image file"),
        _column("alt_text", _TEXT, "web text, untouched"),
        _column("status", _TEXT, "ok, or the kind of failure", False),
        _column("reason", _TEXT, "the failure in words; null when ok"),
        _column("attempts", pa.int32(), "how often the address was asked", False),
        _column(
            "shard", _TEXT, "shard that holds the image, of a duplicate too; null where none does"
        ),
        _column("offset", _INT, "first byte of the image in the shard"),
        _column("size", _INT, "bytes of the image"),
        _column("width", pa.int32(), "stored width in px"),
        _column("height", pa.int32(), "stored height in px"),
        _column("image_id", _TEXT, "sha256 of the stored bytes, 32 hex digits"),
        _column("phash", _TEXT, "64-bit difference hash of the picture, 16 hex digits"),
        _column("looks", pa.binary(), "hashes and colours of five views, to know copies again by"),
        _column("fetched_at", _TIME, "when it was fetched; the only column that varies by run"),
        _column("licence", _TEXT, "licence as the list states it"),
        _column("extra", _TEXT, "the list's other columns, as a JSON object"),
    ]
)

CAPTIONS = pa.schema(
    [
        _column("caption_id", _TEXT, "id of (image_id, source, caption)", False),
        _column("image_id", _TEXT, "the image it is proposed for", False),
        _column("source", _TEXT, "web, synthetic or human", False),
        _column("caption", _TEXT, "the text; null when none could be made"),
        _column("model_id", _TEXT, "captioner; null for web and human texts"),
        _column("top_p", _FLOAT, "nucleus mass it was sampled with"),
        _column("seed", _INT, "seed it was sampled with"),
        _column("index", pa.int32(), "which of the image's captions, from 0"),
        _column("num_tokens", pa.int32(), "generated tokens"),
        _column("mean_logprob", _FLOAT, "mean log-probability of the generated tokens"),
        _column("finish_reason", _TEXT, "sep (the model ended it), length (the limit did) or nan"),
        _column(
            "status", _TEXT, "ok, or the kind of failure; caption_id is unique among ok", False
        ),
        _column("round", pa.int32(), "round that proposed it; 0 for web and human", False),
    ]
)

SCORES = pa.schema(
    [
        _column("caption_id", _TEXT, "the caption", False),
        _column("image_id", _TEXT, "its image", False),
        _column("model_id", _TEXT, "the filter, or another scorer", False),
        _column("itm_prob", _FLOAT, "probability of a match, softmax of the ITM head"),
        _column("itc_sim", _FLOAT, "cosine of the two features, unscaled"),
        _column("status", _TEXT, "ok, or the kind of failure", False),
        _column("error", _TEXT, "the failure in words; null when ok"),
        _column("round", pa.int32(), "round whose filter it is", False),
    ]
)

DECISIONS = pa.schema(
    [
        _column("caption_id", _TEXT, "the caption", False),
        _column("image_id", _TEXT, "its image", False),
        _column("source", _TEXT, "web or synthetic", False),
        _column("round", pa.int32(), "round of the decision", False),
        _column("policy", _TEXT, "the SQL file that decided", False),
        _column("params", _TEXT, "its parameters, as a JSON object", False),
        _column("kept", _BOOL, "whether it goes into the clean set", False),
        _column("reason", _TEXT, "why", False),
        _column("generation", _TEXT, "policy and parameters that decided; names the part"),
    ]
)

_VARIANT = _column("variant", _TEXT, "decoding of its captions, another than the round's", False)

# What a comparison makes of captions that another decoding wrote: apart, so that nothing takes it for the round's.
VARIANT_CAPTIONS = CAPTIONS.append(_VARIANT)
VARIANT_SCORES = SCORES.append(_VARIANT)
VARIANT_DECISIONS = DECISIONS.append(_VARIANT)

MODEL_RECORDS = pa.schema(
    [
        _column("model_id", _TEXT, "first 32 hex digits of the sha256 of its weights", False),
        _column(
            "role",
            _TEXT,
            "med, captioner, filter, arm, foreign_captioner or foreign_scorer",
            False,
        ),
        _column("parent_id", _TEXT, "the model it was finetuned from; null from scratch"),
        _column("round", pa.int32(), "round that trained it", False),
        _column(
            "path",
            _TEXT,
            "its folder in the lake; of a foreign model hf:, blip:, clip:, ...",
            False,
        ),
        _column("trained_on", _TEXT, "fingerprint of its training set"),
        _column("config", _TEXT, "its configuration, as a JSON object"),
        _column("created_at", _TIME, "when it was registered"),
    ]
)

METRICS = pa.schema(
    [
        _column("round", pa.int32(), "round that measured it", False),
        _column("model_id", _TEXT, "the model measured", False),
        _column(
            "dataset", _TEXT, "what it was measured on; train-<plan> for training curves", False
        ),
        _column("metric", _TEXT, "name of the number", False),
        _column("value", _FLOAT, "the number"),
        _column("low", _FLOAT, "lower end of its 95 % interval"),
        _column("high", _FLOAT, "upper end of its 95 % interval"),
        _column("n", _INT, "cases behind it; the step for training curves"),
        _column("protocol", _TEXT, "zero-shot or finetuned; null for training curves"),
    ]
)

RANKS = pa.schema(
    [
        _column("round", pa.int32(), "round that measured it", False),
        _column("model_id", _TEXT, "the model measured", False),
        _column("dataset", _TEXT, "what it was measured on", False),
        _column("direction", _TEXT, "i2t (image to text) or t2i (text to image)", False),
        _column("image_id", _TEXT, "the image", False),
        _column("caption_id", _TEXT, "the text that was looked up; null for i2t"),
        _column("rank", _INT, "place of what belongs to it, from 0", False),
    ]
)

GATE_RULES = pa.schema(
    [
        _column("round", pa.int32(), "round that was judged", False),
        _column("rule", _TEXT, "name of the rule, as in the settings", False),
        _column("dataset", _TEXT, "dataset of the figure in metrics", False),
        _column("metric", _TEXT, "name of the figure in metrics", False),
        _column("model_id", _TEXT, "model that the figure is of; null when not measured"),
        _column("measured", _FLOAT, "the figure"),
        _column("reference", _FLOAT, "what it is compared with"),
        _column("value", _FLOAT, "the figure, its difference or its ratio: held against the limit"),
        _column("low", _FLOAT, "lower end of the 95 % interval of value"),
        _column("high", _FLOAT, "upper end of the 95 % interval of value"),
        _column("limit", _FLOAT, "the limit", False),
        _column("direction", _TEXT, "at_least or at_most", False),
        _column("against", _TEXT, "champion, best, first, last or nothing", False),
        _column("outcome", _TEXT, "pass, fail or not measured", False),
        _column("verdict_if_failed", _TEXT, "refuse or person", False),
        _column("why", _TEXT, "the rule's finding in words", False),
    ]
)

ARMS = pa.schema(
    [
        _column("round", pa.int32(), "round whose texts were decided on", False),
        _column("policy", _TEXT, "the SQL file that decided", False),
        _column("params", _TEXT, "its parameters, as a JSON object", False),
        _column("label", _TEXT, "policy, and its parameters that are not the default", False),
        _column("generation", _TEXT, "the decisions that its training set is made of", False),
        _column("seed", _INT, "seed that its model was trained with", False),
        _column("steps", _INT, "optimizer steps that its model was trained for", False),
        _column("model_id", _TEXT, "its model", False),
        _column("trained_on", _TEXT, "fingerprint of its training set", False),
        _column("num_web", _INT, "web texts in its training set", False),
        _column("num_synthetic", _INT, "synthetic texts in its training set", False),
        _column("num_human", _INT, "human texts in its training set", False),
        _column("dropped_web", _INT, "web texts left out; null when it uses none of them"),
        _column("dropped_synthetic", _INT, "the same of synthetic texts"),
        _column("settings", _TEXT, "what all arms of a comparison share, as JSON", False),
        _column(
            "decoding", _TEXT, "how the captions it saw were decoded; null where it keeps none"
        ),
    ]
)

ARM_RESAMPLES = pa.schema(
    [
        _column("round", pa.int32(), "round of the arm", False),
        _column("model_id", _TEXT, "the arm's model", False),
        _column("metric", _TEXT, "name of the figure, as in metrics", False),
        _column("resample", pa.int32(), "which resample of the held-out images, from 0", False),
        _column("value", _FLOAT, "the figure on it; the same images for every model"),
    ]
)

ROUND_STATUSES = ("running", "promoted", "refused", "needs a person", "rolled back", "failed")
"""What a round may have come to; all but `running` are ends."""

ROUNDS = pa.schema(
    [
        _column("round", pa.int32(), "the round, from 1", False),
        _column("status", _TEXT, f"one of {', '.join(ROUND_STATUSES)}", False),
        _column("settings", _TEXT, "what it was begun with, as a JSON object", False),
        _column("counts", _TEXT, "rows by stage, as a JSON object", False),
        _column("champion_before", _TEXT, "model id of the champion it began with"),
        _column("champion_after", _TEXT, "model id of the champion it left"),
        _column("why", _TEXT, "the gate's reason"),
        _column("started_at", _TIME, "when it was begun"),
        _column("finished_at", _TIME, "when it ended"),
        _column("seconds", _TEXT, "wall seconds by stage, as a JSON object", False),
        _column("device_seconds", _TEXT, "device seconds by stage, as a JSON object", False),
        _column("speed", _TEXT, "images/s, memory and MFU by training, as a JSON object"),
        _column("decided_by", _TEXT, "gate or hand; null while running and in older parts"),
        _column("origin", _TEXT, "what a later round started from and what was new, in words"),
    ]
)

CANARY_DRAWS = pa.schema(
    [
        _column("image_id", _TEXT, "a human image", False),
        _column("is_canary", _BOOL, "kept out of all training, to audit filters with", False),
        _column("round", pa.int32(), "round in which it came in and was drawn", False),
    ]
)

CANARIES = pa.schema(
    [
        _column("caption_id", _TEXT, "id of (image_id, kind, caption)", False),
        _column("image_id", _TEXT, "a human image that nothing was trained on", False),
        _column("kind", _TEXT, "true, random, hard, swapped or written", False),
        _column("truth", _BOOL, "whether it describes the image; null for a written one"),
        _column("contradicted", _BOOL, "names what people agree on and nobody named here"),
        _column("stratum", _TEXT, "length of the text: short, medium or long", False),
        _column("caption", _TEXT, "the text", False),
        _column("model_id", _TEXT, "the round's filter, or another scorer", False),
        _column("itm_prob", _FLOAT, "what it says: probability of a match"),
        _column("itc_sim", _FLOAT, "what it says: cosine"),
        _column("judge_id", _TEXT, "the frozen judge", False),
        _column("judge_itm_prob", _FLOAT, "what the judge says: probability of a match"),
        _column("judge_itc_sim", _FLOAT, "what the judge says: cosine"),
        _column("round", pa.int32(), "round whose filter was audited", False),
    ]
)

JUDGEMENTS = pa.schema(
    [
        _column("caption_id", _TEXT, "a web or synthetic text of the round's sample", False),
        _column("image_id", _TEXT, "its image", False),
        _column("source", _TEXT, "web or synthetic", False),
        _column("model_id", _TEXT, "the frozen judge", False),
        _column("itm_prob", _FLOAT, "what the judge says: probability of a match"),
        _column("itc_sim", _FLOAT, "what the judge says: cosine"),
        _column("round", pa.int32(), "round whose texts were judged", False),
    ]
)

PURGED = pa.schema(
    [
        _column("purge_id", _TEXT, "the purge that took it out", False),
        _column("asked", _TEXT, "what was asked for that led to it, in words", False),
        _column("because", _TEXT, "why, as it was asked", False),
        _column("purged_at", _TIME, "when the purge was begun"),
        _column("pool", _TEXT, "web, human or heldout", False),
        _column("key", _TEXT, "key of the input row in pairs", False),
        _column("url", _TEXT, "address of the input row"),
        _column("address", _TEXT, "the same in its normal form; null where it is no web address"),
        _column("image_id", _TEXT, "the image; null where none had come of the row"),
        _column("shard", _TEXT, "shard that held its bytes; null where the row stored none"),
        _column("offset", _INT, "first byte of where it lay"),
        _column("size", _INT, "bytes that it took"),
        _column("models", _TEXT, "ids of models that were trained on the image, as a JSON list"),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "pairs": PAIRS,
    "captions": CAPTIONS,
    "scores": SCORES,
    "decisions": DECISIONS,
    "canary_draws": CANARY_DRAWS,
    "canaries": CANARIES,
    "judgements": JUDGEMENTS,
    "models": MODEL_RECORDS,
    "metrics": METRICS,
    "rounds": ROUNDS,
    "ranks": RANKS,
    "gate_rules": GATE_RULES,
    "arms": ARMS,
    "arm_resamples": ARM_RESAMPLES,
    "purged": PURGED,
    "variant_captions": VARIANT_CAPTIONS,
    "variant_scores": VARIANT_SCORES,
    "variant_decisions": VARIANT_DECISIONS,
}

ADDED_LATER = {
    "arms": ("decoding",),
    "decisions": ("generation",),
    "metrics": ("protocol",),
    "pairs": ("looks",),
    "rounds": ("speed", "decided_by", "origin"),
}
"""Columns that parts of older lakes do not have; nullable."""


def schema_of(table: str) -> pa.Schema:
    """The schema of a table; ValueError with the known names otherwise."""
    if table not in TABLES:
        raise ValueError(f"table {table!r} is unknown; there are {', '.join(TABLES)}")
    return TABLES[table]


def conform(table: str, data: pa.Table) -> pa.Table:
    """`data` with the columns of `table` in order; absent ones become null, others are refused."""
    schema = schema_of(table)
    unknown = [name for name in data.column_names if name not in schema.names]
    if unknown:
        raise ValueError(f"table {table} has no column {unknown[0]!r}; see storage/schemas.py")
    columns = []
    for field in schema:
        if field.name in data.column_names:
            column = data.column(field.name).cast(field.type)
        else:
            column = pa.nulls(data.num_rows, field.type)
        if not field.nullable and column.null_count:
            raise ValueError(f"table {table}, column {field.name}: {column.null_count} null values")
        columns.append(column)
    return pa.table(columns, schema=schema)
