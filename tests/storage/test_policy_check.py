"""What is wrong with a user's policy is said before it touches a lake, with the line quoted."""

import re
from pathlib import Path

import pytest
from rounds_of_rows import write_world

from storage.errors import ConfigError
from storage.lake import Lake
from storage.policy import decide
from storage.policy_check import check_policy
from storage.policy_file import parse_policy
from storage.policy_header import read_header

GOOD = "SELECT caption_id, true AS kept, 'all' AS reason FROM candidates"


def _refused(sql: str, **params: object) -> str:
    policy = parse_policy("mine", sql)
    with pytest.raises(ConfigError) as caught:
        check_policy(policy, policy.params(params))
    return str(caught.value)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", r'mine is not SQL: .*line 1, `SELEC 1`'),
        ("SELECT caption_id,\n  true AS kept,\n  'x' AS AS reason\nFROM candidates", "line 3, `'x' AS AS reason`"),
        ("SELECT 1; SELECT 2", "there are 2 statements"),
        ("DROP TABLE captions", "DROP statements are refused"),
        ("COPY candidates TO '/tmp/x'", "COPY statements are refused"),
        ("SELECT caption_id,\n  itm_prb > 0.5 AS kept, 'x' AS reason\nFROM candidates", r'"itm_prb".*"itm_prob".*line 2, `itm_prb > 0.5'),
        ("SELECT caption_id, true AS kept, 'x' AS reason\nFROM candidate", "line 2, `FROM candidate`: there is no table 'candidate'"),
        ("SELECT caption_id, true AS kept, 'x' AS reason FROM '/etc/passwd', candidates", "no table '/etc/passwd'"),
        ("SELECT caption_id, true AS kept, 'x' AS reason\nFROM candidates, read_csv('x.csv')", r"line 2, .*: read_csv\(\) reads what is not of the lake"),
        ("SELECT caption_id,\n  random() > 0.5 AS kept, 'x' AS reason FROM candidates", r"line 2, .*: random\(\) gives another answer"),
        ("SELECT caption_id, now() > '2020-01-01'::TIMESTAMPTZ AS kept, 'x' AS reason FROM candidates", r"now\(\) gives another"),
        ("SELECT caption_id, current_date > '2020-01-01' AS kept, 'x' AS reason FROM candidates", "current_date gives another"),
        ("SELECT caption_id, current_timestamp IS NOT NULL AS kept, 'x' AS reason FROM candidates", "current_timestamp gives another"),
        ("SELECT caption_id, true AS kept, CAST(uuid() AS VARCHAR) AS reason FROM candidates", r"uuid\(\) gives another"),
        ("SELECT caption_id, true AS kept, 'x' AS reason FROM candidates WHERE nextval('s') > 0", r"nextval\(\) gives another"),
        ("SELECT caption_id, true AS kept, 'x' AS reason FROM candidates TABLESAMPLE 50%", "a sample is another one"),
        ("SELECT caption_id, itm_prob > approx_quantile(itm_prob, 0.5) OVER () AS kept, 'x' AS reason FROM candidates", "approx_quantile"),
        ("SELECT caption_id, row_number() OVER () % 2 = 0 AS kept, 'x' AS reason FROM candidates", "not deterministic"),
        ("SELECT caption_id, first_value(source) OVER () = 'web' AS kept, 'x' || row_number() OVER () AS reason FROM candidates", "not deterministic"),
        ("SELECT caption_id, true AS kept FROM candidates", "no column reason"),
        ("SELECT caption_id, itm_prob AS kept, 'x' AS reason FROM candidates", "kept as DOUBLE, and it must be BOOLEAN"),
        ("SELECT caption_id, true AS kept, 1 AS reason FROM candidates", "reason as INTEGER, and it must be VARCHAR"),
        ("SELECT caption_id, true AS kept, 'x' AS reason, caption FROM candidates", "a column caption that decisions do not have"),
        (f"{GOOD} WHERE source = 'web'", r"\d+ texts are missing, 0 rows are doubled"),
        (f"{GOOD} UNION ALL {GOOD}", r"0 texts are missing, \d+ rows are doubled"),
        ("SELECT caption_id || 'x' AS caption_id, true AS kept, 'x' AS reason FROM candidates", "rows are of no text"),
        ("SELECT caption_id, itm_prob > 0.5 AS kept, 'x' AS reason FROM candidates", "rows have no verdict or reason"),
        ("SELECT caption_id, source, image_id || '' AS image_id, true AS kept, 'x' AS reason FROM candidates UNION ALL BY NAME SELECT 'a' AS caption_id, 'b' AS image_id, 'c' AS source, true AS kept, 'd' AS reason", "1 rows are of no text"),
        ("SELECT caption_id, itm_prob > $cut AS kept, 'x' AS reason\nFROM candidates", r"line 1, .*\$cut is not declared; add a line such as `-- parameter cut: number"),
        ("-- parameter cut: number = 0.5, from 0 to 1: unused\n" + GOOD, r"line 1, .*its SQL does not use \$cut"),
        ("-- decides: image by image\nSELECT caption_id, coalesce(itm_prob >= avg(itm_prob) OVER (), false) AS kept, 'x' AS reason FROM candidates", "depends on other images"),
        ("-- decides: image by image, after cuts\n" + GOOD, r"no clause WITH cuts AS"),
        ("SELECT caption_id, CAST(caption AS INTEGER) > 1 AS kept, 'x' AS reason FROM candidates", "mine failed: Conversion Error"),
    ],
)  # fmt: skip
def test_check_names_what_is_wrong_and_quotes_the_line(sql: str, said: str) -> None:
    assert re.search(said, text := _refused(sql), re.DOTALL), text


def test_check_stops_a_policy_that_takes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.policy_check.TIME_LIMIT_S", 0.5)
    sql = (
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i > 0) "
        "SELECT caption_id, (SELECT max(i) FROM n) > 0 AS kept, 'x' AS reason FROM candidates"
    )
    assert "mine took longer than 0.5 s and was stopped" in _refused(sql)


@pytest.mark.parametrize(
    "sql",
    [
        GOOD,
        f"FROM ({GOOD});",
        "WITH best AS (SELECT image_id, max(itm_prob) AS top FROM candidates GROUP BY image_id) "
        "SELECT caption_id, coalesce(itm_prob = top, false) AS kept, 'x' AS reason FROM candidates JOIN best USING (image_id)",
        "SELECT c.caption_id, p.width > 0 OR c.source = 'web' AS kept, p.url AS reason FROM candidates c "
        "JOIN (SELECT DISTINCT image_id, url, coalesce(width, 0) AS width FROM pairs) p USING (image_id)",
        "-- decides: image by image\nSELECT *, true AS kept, 'x' AS reason FROM (SELECT caption_id FROM candidates)",
        "SELECT caption_id, 'random()' <> caption AS kept, 'now()' AS reason -- random()\nFROM candidates",
    ],
)  # fmt: skip
def test_check_lets_what_will_do_pass(sql: str) -> None:
    policy = parse_policy("mine", sql)
    assert check_policy(policy, {}).policy is policy


def test_decide_stops_at_its_time_limit_and_leaves_nothing(
    local_lake: Lake, tmp_path: Path
) -> None:
    write_world(local_lake)
    slow = tmp_path / "slow.sql"
    # Quick on the made-up texts, which no caption of this lake is among.
    slow.write_text(
        "SELECT caption_id, (SELECT count(*) FROM range(CASE WHEN caption LIKE 'text%' THEN 10000000000 ELSE 1 END) "
        "t(i) WHERE i % 7 = 3) >= 0 AS kept, 'x' AS reason FROM candidates"
    )
    with pytest.raises(ConfigError, match=r"slow took longer than 0\.3 s .*decide\.time_limit_s"):
        decide(local_lake, 1, str(slow), time_limit_s=0.3)
    assert not local_lake.root.list_recursive("tables/decisions")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-- parameter threshold = 0.5", "not a parameter as a header has it"),
        ("-- parameter threshold: float = 0.5: x", "types are number, whole number, text"),
        ("-- parameter t: number = 0.5, from 1 to 0: x", "from 1 to 0 is no range"),
        ("-- parameter t: number = 2, from 0 to 1: x", r"2\.0 is not a number from 0 to 1"),
        ("-- parameter t: number = half: x", "its default half is no number"),
        ("-- parameter t: text = c, one of a, b: x", "'c' is not one of a, b"),
        ("-- parameter t: number = 1, one of 1, 2: x", "`one of` is for a text"),
        ("-- decides: quickly", "a policy decides image by image or image by image, after cuts"),
        ("-- parameter t: number = 1: x\n-- parameter t: number = 1: x", "t stands on line 2 too"),
    ],
)
def test_header_quotes_the_line_that_is_not_as_it_should_be(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_header(f"-- mine\n{line}\n{GOOD}", "mine")
    number = 3 if "\n" in line else 2
    assert f"policy mine, line {number}, `{line.splitlines()[-1]}`" in str(caught.value)


def test_generation_is_named_by_what_runs_and_not_by_comments() -> None:
    declared = "-- parameter t: number = 0.5, from 0 to 1: least\n"
    sql = "SELECT caption_id, itm_prob > $t AS kept, '-- x' AS reason FROM candidates"
    first = parse_policy("mine", declared + sql)
    name = first.generation({"t": 0.5})
    assert re.fullmatch(r"mine-[0-9a-f]{10}", name)
    assert (
        parse_policy("mine", f"-- said otherwise\n{declared}\n  {sql} -- end").generation(
            {"t": 0.5}
        )
        == name
    )
    assert first.generation({"t": 0.6}) != name
    assert (
        parse_policy("mine", declared + sql.replace("-- x", "-- y")).generation({"t": 0.5}) != name
    )
    assert parse_policy("other", declared + sql).generation({"t": 0.5}) != name
