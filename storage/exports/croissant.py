"""The data set in Croissant's JSON-LD (mlcommons.org/croissant/1.0), for programs that look for data."""

import json
from typing import Any

import pyarrow as pa

from storage.exports import hf_parquet, id_list
from storage.exports.facts import Facts
from storage.exports.target import File

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification gives; validators compare it word for word."""

TEXT, NUMBER, IMAGE = "sc:Text", "sc:Float", "sc:ImageObject"
MEANING = {
    "image": "the image, or where it lies",
    "caption": "a text of the image",
    "captions": "the texts of the image, the most trusted first",
    "caption_id": "id of (image, source, text)",
    "image_id": "first 32 hex digits of the sha256 of the image's bytes",
    "source": "who wrote the text: web, synthetic or human",
    "itm_prob": "the filter's probability that text and image match; null for human texts",
    "url": "address of the image",
    "licence": "licence as the list of addresses states it",
}


def croissant(facts: Facts) -> str:
    """The whole croissant.json."""
    licences = [name for name, _, _ in facts.by_licence if name is not None]
    record = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": facts.title,
        "description": (
            f"{facts.num_texts} texts of {facts.num_images} images from the web, kept by the policy "
            f"{facts.config['policy']} of a bootstrapping round (CapFilt). See README.md."
        ),
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": licences or ["not stated"],
        "version": "1.0.0",
        "datePublished": facts.decided_on,
        "isLiveDataset": False,
        "keywords": ["image-text pairs", "captions", "BLIP", "CapFilt"],
        "citeAs": "Li et al. BLIP: Bootstrapping Language-Image Pre-training. ICML 2022.",
        "distribution": _distribution(facts),
        "recordSet": [_records(facts)],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _distribution(facts: Facts) -> list[dict[str, Any]]:
    if facts.format in ("blip-json", "coco-json"):
        return [
            *(
                _file_object(f, "application/json")
                for f in facts.files
                if f.path == "captions.json"
            ),
            _file_set("images", "image/*", "images/*/*"),
        ]
    if facts.format == "webdataset":
        tars = [file for file in facts.files if file.path.endswith(".tar")]
        inside = [{"@id": file.path} for file in tars]
        return [
            *(_file_object(file, "application/x-tar") for file in tars),
            _file_set("samples", "application/json", "*.json") | {"containedIn": inside},
            _file_set("images", "image/*", ["*.jpg", "*.png", "*.webp", "*.gif", "*.bmp"])
            | {"containedIn": inside},
            _file_set("texts", "text/plain", "*.txt") | {"containedIn": inside},
        ]
    kind = ("csv", "text/csv") if facts.plan.csv else ("parquet", "application/x-parquet")
    return [_file_set("tables", kind[1], f"data/*.{kind[0]}")]


def _file_object(file: File, encoding: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file.path,
        "name": file.path,
        "contentUrl": file.path,
        "contentSize": f"{file.num_bytes} B",
        "encodingFormat": encoding,
        "sha256": file.sha256,
    }


def _file_set(name: str, encoding: str, includes: str | list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "encodingFormat": encoding,
        "includes": includes,
    }


def _records(facts: Facts) -> dict[str, Any]:
    if facts.format == "hf-parquet":
        schema = hf_parquet.schema_of(facts.plan.captions)
        fields = [_column(column) for column in schema]
    elif facts.format == "ids":
        fields = [_column(column) for column in id_list.SCHEMA]
    elif facts.format == "webdataset":
        fields = _sample_fields()
    else:
        fields = _json_fields(facts)
    return {
        "@type": "cr:RecordSet",
        "@id": "pairs",
        "name": "pairs",
        "description": "What was kept: images with their texts.",
        "field": fields,
    }


def _column(column: pa.Field) -> dict[str, Any]:
    """A field that is a column of the tables."""
    source: dict[str, Any] = {"fileSet": {"@id": "tables"}, "extract": {"column": column.name}}
    if column.name == "image":
        source["transform"] = {"jsonPath": "bytes"}
        return _field("image", IMAGE, source)
    repeated = pa.types.is_list(column.type)
    kind = column.type.value_type if repeated else column.type
    number = "sc:Integer" if pa.types.is_integer(kind) else NUMBER
    return _field(column.name, TEXT if pa.types.is_string(kind) else number, source, repeated)


def _sample_fields() -> list[dict[str, Any]]:
    """Fields of the samples in tars; what the `.json` says is there for those who open the tars."""
    texts: dict[str, Any] = {"fileSet": {"@id": "texts"}}
    of_name = {"extract": {"fileProperty": "filename"}, "transform": {"regex": "^([0-9a-f]{32})"}}
    return [
        _field("image_id", TEXT, texts | of_name),
        _field("caption", TEXT, texts | {"extract": {"fileProperty": "content"}}),
    ]


def _json_fields(facts: Facts) -> list[dict[str, Any]]:
    """Fields of captions.json."""
    names: tuple[str, ...] = ("image_id", "caption", "caption_id", "source", "itm_prob")
    at = "$.annotations[*]."
    if facts.format == "blip-json":
        at, names = "$[*].", ("image", "url", *names)
    listed = facts.plan.captions == "list"
    fields = []
    for name in names:
        source = {"fileObject": {"@id": "captions.json"}, "extract": {"jsonPath": f"{at}{name}"}}
        repeated = listed and name not in ("image", "image_id", "url")
        fields.append(_field(name, NUMBER if name == "itm_prob" else TEXT, source, repeated))
    if facts.format == "coco-json":
        fields[0] |= {"dataType": "sc:Integer", "description": "number of the image in `images`"}
    return fields


def _field(name: str, kind: str, source: dict[str, Any], repeated: bool = False) -> dict[str, Any]:
    field = {
        "@type": "cr:Field",
        "@id": f"pairs/{name}",
        "name": name,
        "description": MEANING.get(name) or MEANING.get(name.removesuffix("s")) or name,
        "dataType": kind,
        "source": source,
    }
    return field | {"repeated": True} if repeated else field
