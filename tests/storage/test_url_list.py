import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import ConfigError, EmptyInput, MissingColumn
from storage.intake import url_list
from storage.intake.url_list import ListFormat, ListRow, UrlListConfig, open_list, open_table

COLUMNS = {"link": "url", "text": "alt_text"}


def rows_of(path: Path) -> list[ListRow]:
    return [row for batch in open_table(path, COLUMNS) for row in batch]


def write(path: Path, kind: str) -> Path:
    path = path / f"list.{kind}"
    if kind == "parquet":
        table = pa.table({"link": ["u0", "u1"], "text": ["a", None], "n": [1, 2]})
        pq.write_table(table, path)
    elif kind == "csv":
        path.write_text("link,text,n\nu0,a,1\n\nu1,,2\n")
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(b"link,text,n\nu0,a,1\nu1,,2\n"))
    elif kind == "tsv":
        path.write_text("link\ttext\tn\nu0\ta\t1\nu1\t\t2\n")
    else:
        path.write_text('{"link": "u0", "text": "a", "n": 1}\n{"link": "u1", "n": 2}\n')
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "tsv", "jsonl"])
def test_table_gives_wanted_columns_and_keeps_the_others(tmp_path: Path, kind: str) -> None:
    rows = rows_of(write(tmp_path, kind))
    assert [(r.position, r.values["url"], r.bad) for r in rows] == [
        (0, "u0", None),
        (1, "u1", None),
    ]
    assert rows[0].values["alt_text"] == "a"
    assert not rows[1].values.get("alt_text")
    assert [int(r.extra["n"]) for r in rows] == [1, 2]


def test_text_that_is_not_utf8_spoils_its_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"link,text\nu0,caf\xc3\xa9\nu1,caf\xe9\nu2,fine\n")
    rows = rows_of(path)
    assert [r.bad for r in rows] == [None, "column text: not UTF-8 at character 3", None]
    assert rows[0].values["alt_text"] == "caf\u00e9"
    assert rows[1].values == {"url": "u1", "alt_text": "caf\ufffd"}


def test_parquet_text_that_is_not_utf8_spoils_its_own_row_only(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"link": ["u0", "u1"], "text": text}), tmp_path / "list.parquet")
    assert [r.bad for r in rows_of(tmp_path / "list.parquet")] == [
        None,
        "column text: not UTF-8 at character 3",
    ]


def test_half_a_surrogate_pair_spoils_its_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"link": "u0", "text": "a \\ud83c b"}\n{"link": "u1", "text": "c"}\n')
    rows = rows_of(path)
    assert [r.bad for r in rows] == ["column text: not UTF-8 at character 2", None]
    assert rows[0].values["alt_text"].startswith("a \ufffd")


def test_malformed_rows_keep_their_place_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(
        '{"link": "u0", "text": "a"}\nnonsense\n[1]\n{"link": "u3", "text": "x\\u0000"}\n'
    )
    rows = rows_of(path)
    assert [r.position for r in rows] == [0, 1, 2, 3]
    reasons = [(r.bad or "").split(":")[0] for r in rows]
    assert reasons == ["", "not JSON", "not a JSON object", "column text"]
    (tmp_path / "list.csv").write_text("link,text\nu0,a,b,c\nu1\n")
    assert [r.bad for r in rows_of(tmp_path / "list.csv")] == [
        "4 fields where the header has 2",
        "1 fields where the header has 2",
    ]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_missing_column_is_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    with pytest.raises(MissingColumn, match=rf"list\.{kind} has no column 'URL'"):
        list(open_table(path, {"URL": "url"}))


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.csv", b""), ("e.csv", b"link,text\n"), ("e.jsonl", b"\n")],
    ids=["no header", "header only", "blank"],
)
def test_empty_list_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EmptyInput, match=name):
        rows_of(tmp_path / name)


def test_empty_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"link": ["u"], "text": ["t"]}).slice(0, 0), tmp_path / "e.parquet")
    with pytest.raises(EmptyInput):
        rows_of(tmp_path / "e.parquet")


def test_unreadable_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv does not exist"):
        rows_of(tmp_path / "gone.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        rows_of(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"list\.txt: the ending"):
        rows_of(tmp_path / "list.txt")


def test_table_comes_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_list, "BATCH_ROWS", 10)
    lines = "".join(f"u{i},t\n" for i in range(25))
    (tmp_path / "l.csv").write_text(f"link,text\n{lines}")
    assert [len(b) for b in open_table(tmp_path / "l.csv", COLUMNS)] == [10, 10, 5]


def listed(config: UrlListConfig) -> list[tuple[int, str | None, str | None]]:
    rows = [row for batch in open_list(config) for row in batch]
    return [(row.position, row.values["url"], row.values["alt_text"]) for row in rows]


def test_lists_are_read_as_they_were_published(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv").write_text('a "quoted, text\thttp://a/1\nan other\thttp://a/2\n')
    (tmp_path / "cc12m.tsv").write_text('http://a/1\tit\'s "12 m"\nhttp://a/2\n')
    laion = pa.table({"SAMPLE_ID": [1], "URL": ["http://a/1"], "TEXT": ["t"], "NSFW": ["UNLIKELY"]})
    pq.write_table(laion, tmp_path / "laion.parquet")
    renamed = pa.table({"url": ["http://a/1"], "caption": ["t"], "similarity": [0.3]})
    pq.write_table(renamed, tmp_path / "laion2.parquet")
    pool = pa.table({"uid": ["f00"], "url": ["http://a/1"], "text": ["t"], "sha256": ["00"]})
    pq.write_table(pool, tmp_path / "datacomp.parquet")

    def of(name: str, format: ListFormat) -> list[tuple[int, str | None, str | None]]:
        return listed(UrlListConfig(path=str(tmp_path / name), format=format))

    assert of("cc3m.tsv", "cc3m") == [
        (0, "http://a/1", 'a "quoted, text'),
        (1, "http://a/2", "an other"),
    ]
    assert of("cc12m.tsv", "cc12m") == [(0, "http://a/1", 'it\'s "12 m"'), (1, "http://a/2", "")]
    assert of("laion.parquet", "laion") == of("laion2.parquet", "laion") == [(0, "http://a/1", "t")]
    assert of("datacomp.parquet", "datacomp") == [(0, "http://a/1", "t")]
    with pytest.raises(MissingColumn, match=r"datacomp\.parquet has no column 'caption'"):
        of("datacomp.parquet", "cc3m")
    with pytest.raises(ConfigError, match="format 'coyo' is unknown"):
        of("laion.parquet", "coyo")  # type: ignore[arg-type]


def test_a_list_may_be_many_files(tmp_path: Path) -> None:
    for number in range(3):
        table = pa.table({"url": [f"http://a/{number}"] * 2, "alt_text": ["t"] * 2})
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
    (tmp_path / "readme.md").write_text("no part of it")
    whole = listed(UrlListConfig(path=str(tmp_path)))
    assert [position for position, _, _ in whole] == list(range(6))
    assert [url for _, url, _ in whole][::2] == [f"http://a/{n}" for n in range(3)]
    assert len(listed(UrlListConfig(path=str(tmp_path / "part-[12].parquet")))) == 4
    with pytest.raises(ConfigError, match=r"no file matches; check the path"):
        listed(UrlListConfig(path=str(tmp_path / "part-9*.parquet")))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no Parquet, CSV or JSONL file is in it"):
        listed(UrlListConfig(path=str(tmp_path / "none")))
