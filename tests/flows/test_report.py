"""The page of a round: facts by SQL from the raw views, then looked at in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lake_tables import CLEAN, FILTER, RAW, LakeTables
from PIL import Image

from flows.quickstart.world import WorldConfig, build_world
from flows.report import build_report
from flows.report.facts import ReportFacts
from flows.report.gather import gather_facts
from flows.report.render import render_report
from flows.report.thumbnails import thumbnail_uri
from flows.scales import duration, nice_ticks, tick_label
from storage.errors import CorruptShard

LOSS_NAMES = ("loss_itc", "loss_itm", "loss_lm")
CHROMIUM_SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> LakeTables:
    config = WorldConfig(num_web=120, num_human=1, num_heldout=1)
    return LakeTables(build_world(config, tmp_path_factory.mktemp("report") / "world"))


@pytest.fixture(scope="module")
def facts(tables: LakeTables) -> ReportFacts:
    with tables.connect() as connection:
        return gather_facts(connection, 1, tables.read_image, lake="lakes/quickstart")


def test_gather_facts_makes_a_funnel_that_adds_up(tables: LakeTables, facts: ReportFacts) -> None:
    listed, stored, proposed, scored, kept = facts.funnel
    assert listed.rows == len(tables.rows["pairs"])
    assert stored.rows == listed.rows - sum(loss.rows for loss in listed.losses) == 120
    assert {loss.reason for loss in listed.losses} >= {"HTTP 4xx", "HTTP 5xx", "opted out"}
    assert proposed.rows == scored.rows == 240
    assert kept.rows == scored.rows - sum(loss.rows for loss in scored.losses)
    assert [loss.reason.split(": ")[1] for loss in scored.losses] == ["itm_prob < 0.5"] * 2


def test_gather_facts_counts_an_unscored_text_as_lost_before_the_filter(
    tables: LakeTables,
) -> None:
    with tables.connect() as connection:
        lost = connection.execute("SELECT min(caption_id) FROM scores").fetchone()
        failed = "itm_prob = NULL, itc_sim = NULL, status = 'decode_error'"
        changes = {"scores": failed, "decisions": "kept = false, reason = 'not scored'"}
        for table, change in changes.items():
            connection.execute(f"UPDATE {table} SET {change} WHERE caption_id = ?", lost)
        _, _, proposed, scored, _ = gather_facts(
            connection, 1, tables.read_image, lake="lake", gallery_pairs=0
        ).funnel
    (loss,) = proposed.losses
    assert (loss.reason.split(": ")[1], loss.rows) == ("not scored", 1)
    assert scored.rows == proposed.rows - 1


def test_gather_facts_of_a_round_scored_by_cosines_alone(tables: LakeTables) -> None:
    with tables.connect() as connection:
        connection.execute("UPDATE scores SET itm_prob = NULL")
        connection.execute("UPDATE decisions SET reason = 'itc_sim 0.0123 < 0.2' WHERE NOT kept")
        connection.execute("DELETE FROM models WHERE role = 'captioner'")
        connection.execute(
            "UPDATE models SET role = 'foreign_scorer', parent_id = NULL, path = 'clip:some/model' "
            "WHERE role = 'filter'"
        )
        connection.execute("UPDATE rounds SET champion_before = NULL")
        facts = gather_facts(connection, 1, tables.read_image, lake="lake")
    _, _, proposed, scored, kept = facts.funnel
    assert proposed.rows == scored.rows == 240 > kept.rows > 0
    assert [loss.reason.split(": ")[1] for loss in scored.losses] == ["itc_sim < 0.2"] * 2
    assert facts.histograms == ()
    by_number = ("judge-apart", "changed")  # of itm_prob, which this scorer lacks
    assert all(group.cards for group in facts.gallery if group.key not in by_number)
    assert facts.arms is not None
    assert (facts.arms.before_id, facts.arms.after_id) == (RAW, CLEAN)
    assert "trained elsewhere" in render_report(facts)


def test_gather_facts_compares_the_new_model_with_what_it_had_to_beat(facts: ReportFacts) -> None:
    assert facts.arms is not None
    assert (facts.arms.before_id, facts.arms.after_id) == (RAW, CLEAN)
    recall = next(row for row in facts.arms.rows if row.metric == "mean_recall")
    assert recall.before is not None
    assert recall.after is not None
    assert (recall.before.value, recall.after.value, recall.after.n) == (0.168, 0.487, 500)


def test_render_report_prints_the_interval_below_its_figure(facts: ReportFacts) -> None:
    page = render_report(facts)
    assert "<b>0.487</b><small>0.447 to 0.527</small>" in page
    assert page.count("<small>0.128 to 0.208</small>") == 1  # the model before
    assert "6.200</b></td>" in page  # CIDEr was measured without one
    assert "Finetuned on the human pairs" not in page


def test_render_report_shows_the_filter_apart_when_it_was_measured(tables: LakeTables) -> None:
    row = {"dataset": "heldout", "metric": "t2i_r1", "value": 0.611, "low": 0.55, "high": 0.66}
    with tables.connect() as connection:
        connection.execute(
            f"INSERT INTO metrics BY NAME SELECT 1 AS round, '{FILTER}' AS model_id, "
            "$dataset AS dataset, $metric AS metric, $value AS value, $low AS low, $high AS high, "
            "500 AS n, 'finetuned' AS protocol",
            row,
        )
        facts = gather_facts(connection, 1, tables.read_image, lake="lake", gallery_pairs=0)
    (found,) = facts.finetuned
    assert (found.role, found.metric, found.figure.value) == ("filter", "t2i_r1", 0.611)
    assert facts.arms is not None
    measured = next(row for row in facts.arms.rows if row.metric == "t2i_r1")
    assert measured.after is not None
    assert measured.after.value == 0.5
    page = render_report(facts)
    assert "<td>filter</td>" in page
    assert "<b>0.611</b><small>0.550 to 0.660</small>" in page


def test_gather_facts_takes_every_curve_and_model_of_the_round(facts: ReportFacts) -> None:
    runs = {"pretrain": LOSS_NAMES, "retrain": LOSS_NAMES}
    runs |= {"captioner": ("loss_lm",), "filter": ("loss_itc", "loss_itm")}
    drawn = {(curve.run, curve.metric) for curve in facts.curves}
    assert drawn == {(run, metric) for run, metrics in runs.items() for metric in metrics}
    assert facts.models[0].made == "pretrain"
    assert len(facts.models) == 4


def test_gather_facts_keeps_the_champions_curve_apart_from_the_new_models(
    tables: LakeTables,
) -> None:
    with tables.connect() as connection:
        connection.execute(
            "INSERT INTO models BY NAME SELECT * REPLACE (2 AS round, 'f' || model_id[2:] AS model_id) "
            "FROM models WHERE round = 1 AND role = 'med'"
        )
        connection.execute(
            "INSERT INTO metrics BY NAME SELECT * REPLACE (2 AS round, 'f' || model_id[2:] AS model_id, "
            f"value + 1 AS value) FROM metrics WHERE model_id = '{CLEAN}'"
        )
        connection.execute(
            f"INSERT INTO rounds BY NAME SELECT * REPLACE (2 AS round, '{CLEAN}' AS champion_before) "
            "FROM rounds"
        )
        curves = {
            (curve.run, curve.metric): curve.points
            for curve in gather_facts(
                connection, 2, tables.read_image, lake="lake", gallery_pairs=0
            ).curves
        }
    assert {run for run, _ in curves} == {"champion", "retrain"}
    for metric in LOSS_NAMES:
        before, after = curves["champion", metric], curves["retrain", metric]
        assert len({step for step, _ in after}) == len(after) == len(before)
        assert [y for _, y in after] == pytest.approx([y + 1 for _, y in before])


def test_gather_facts_fills_each_histogram_with_every_scored_text(facts: ReportFacts) -> None:
    assert [sum(h.kept) + sum(h.dropped) for h in facts.histograms] == [120, 120]
    for histogram in facts.histograms:
        assert sum(histogram.kept[:10]) == sum(histogram.dropped[10:]) == 0


def test_gather_gallery_picks_the_surest_and_the_closest(
    tables: LakeTables, facts: ReportFacts
) -> None:
    groups = {group.key: group.cards for group in facts.gallery}
    for key, kept in (("kept-sure", True), ("dropped-sure", False), ("dropped-close", False)):
        assert [card.texts[0].kept for card in groups[key]] == [kept] * 12
        assert len({card.image_id for card in groups[key]}) == 12
        assert {card.texts[0].source for card in groups[key]} == {"web", "synthetic"}
    dropped = [row["caption_id"] for row in tables.rows["decisions"] if not row["kept"]]
    nearest = max(row["itm_prob"] for row in tables.rows["scores"] if row["caption_id"] in dropped)
    assert nearest in [card.texts[0].itm_prob for card in groups["dropped-close"][:2]]
    for card in groups["replaced"]:
        assert card.texts[0].source == "synthetic"
        assert [text.kept for text in card.texts] == [True, False]
    assert all(card.thumbnail.startswith("data:image/jpeg;base64,") for card in groups["replaced"])


def test_gather_gallery_shows_where_judge_and_filter_part(
    tables: LakeTables, facts: ReportFacts
) -> None:
    (apart,) = [group for group in facts.gallery if group.key == "judge-apart"]
    judged = {row["caption_id"]: row["itm_prob"] for row in tables.rows["judgements"]}
    gaps = {
        row["caption_id"]: abs(row["itm_prob"] - judged[row["caption_id"]])
        for row in tables.rows["scores"]
        if row["caption_id"] in judged
    }
    assert len(apart.cards) == min(12, sum(gap > 0.1 for gap in gaps.values()))
    widest = max(gaps, key=lambda name: gaps[name])
    first = next(row for row in tables.rows["scores"] if row["caption_id"] == widest)
    assert apart.cards[0].texts[0].itm_prob == first["itm_prob"]


def test_gather_gallery_shows_what_changed_since_the_round_before(tables: LakeTables) -> None:
    with tables.connect() as connection:
        connection.execute(
            "INSERT INTO scores BY NAME SELECT * REPLACE (0 AS round, 1 - itm_prob AS itm_prob) "
            "FROM scores ORDER BY caption_id LIMIT 5"
        )
        found = gather_facts(connection, 1, tables.read_image, lake="lake").gallery
    (changed,) = [group for group in found if group.key == "changed"]
    assert 0 < len(changed.cards) <= 5


def test_gather_facts_takes_the_audit_and_the_rules(facts: ReportFacts) -> None:
    assert {curve.kind for curve in facts.audit.curves} == {"random", "hard", "swapped"}
    for curve in facts.audit.curves:
        assert (curve.points[0], curve.points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert sum(each.n for each in facts.audit.bins) == 240
    web = [point for point in facts.audit.sweep if point.source == "web"]
    assert [point.kept for point in web] == sorted((p.kept for p in web), reverse=True)
    assert web[0].kept == web[0].texts == 120
    at_half = next(point for point in web if point.threshold == 0.5)
    assert at_half.noise is not None
    assert at_half.noise.low <= at_half.noise.value <= at_half.noise.high
    assert [rule.outcome for rule in facts.neighbours.rules] == ["fail", "pass", "not measured"]
    assert facts.neighbours.num_failed == 1


def test_gather_gallery_leaves_out_a_picture_that_cannot_be_read(tables: LakeTables) -> None:
    def read_image(shard: str, offset: int, size: int) -> bytes:
        raise CorruptShard(f"shard {shard} is gone")

    with tables.connect() as connection:
        facts = gather_facts(connection, 1, read_image, lake="lake", gallery_pairs=2)
    assert {card.thumbnail for group in facts.gallery for card in group.cards} == {""}
    assert "picture cannot be read" in render_report(facts)


def test_gather_facts_names_a_round_without_record(tables: LakeTables) -> None:
    with tables.connect() as connection, pytest.raises(LookupError, match="round 7"):
        gather_facts(connection, 7, tables.read_image, lake="lake")


def test_gather_facts_of_a_round_that_has_only_begun_renders(tables: LakeTables) -> None:
    with tables.connect() as connection:
        for table in ("captions", "scores", "decisions", "models", "metrics", "pairs"):
            connection.execute(f"DELETE FROM {table}")
        facts = gather_facts(connection, 1, tables.read_image, lake="lake")
    page = render_report(facts)
    assert all(said in page for said in ("Nothing was measured", "No model was trained"))


def test_render_report_is_the_same_twice_and_keeps_markup_as_text(facts: ReportFacts) -> None:
    page = render_report(facts)
    assert page == render_report(facts)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert len(page.encode()) < 5_000_000


def test_build_report_writes_one_page_into_the_lake(tables: LakeTables, tmp_path: Path) -> None:
    lake = tables.commit(str(tmp_path / "lake"))
    path = build_report(lake, 1, gallery_pairs=3)
    page = lake.root.read_bytes(path)
    assert page.count(b"data:image/jpeg;base64,") == 18
    assert b"Mean recall rose from 0.168 to 0.487" in page
    build_report(lake, 1, gallery_pairs=3)
    assert lake.root.read_bytes(path) == page
    with pytest.raises(LookupError, match="round 2"):
        build_report(lake, 2)


@pytest.mark.parametrize("size", [(64, 64), (4000, 3000), (10, 900)])
def test_thumbnail_uri_is_small(size: tuple[int, int], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    assert len(thumbnail_uri((tmp_path / "a.jpg").read_bytes())) < 40_000


def test_thumbnail_uri_refuses_what_is_no_picture() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        thumbnail_uri(b"<html>")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.2, 4.13), (0, 600), (-3, 7), (5, 5), (0, 1e7), (0.001, 0.002)]
)
def test_nice_ticks_span_the_range_with_few_ticks(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7
    assert all(len(tick_label(tick)) <= 7 for tick in ticks)


def test_duration_reads_like_a_clock() -> None:
    said = [duration(seconds) for seconds in (7.44, 185, 3600 * 26 + 60)]
    assert said == ["7.4 s", "3 min 05 s", "26 h 01 min"]


@pytest.fixture(scope="module")
def page_url(facts: ReportFacts, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(render_report(facts))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium that logs its console and every request."""
    if not (chromium := shutil.which("chromium")) or not (driver := shutil.which("chromedriver")):
        pytest.skip("chromium is absent: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for switch in (*CHROMIUM_SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_is_quiet_in_a_real_browser(
    browser: Any, page_url: str, width: int, scheme: str
) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own start page asked for
    browser.get(page_url)
    assert browser.get_log("browser") == []
    assert browser.execute_script(
        "return [innerWidth, document.documentElement.scrollWidth <= innerWidth]"
    ) == [width, True]
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert (len(images), min(images)) == (72, 64)
    assert _requested(browser) == [page_url]
    ink, paper = (_luminance(browser, name) for name in ("color", "backgroundColor"))
    assert (ink > paper) == (scheme == "dark")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7


def test_slider_shows_the_counts_of_its_threshold(
    browser: Any, page_url: str, facts: ReportFacts
) -> None:
    browser.get(page_url)
    browser.execute_script(
        "const s = document.getElementById('threshold'); s.value = 16;"
        "s.dispatchEvent(new Event('input'))"
    )
    cells = browser.execute_script(
        "return [...document.querySelectorAll('#sweep-now tr[data-source=web] td')].map(c => c.textContent)"
    )
    point = next(p for p in facts.audit.sweep if (p.source, p.threshold) == ("web", 0.8))
    assert cells[0] == f"{point.kept:,}"
    assert point.noise is not None
    assert cells[2].startswith(f"{point.noise.value:.3f}")
    said = browser.execute_script("return document.getElementById('threshold').ariaValueText")
    assert said in ("threshold 0.80", None)


def test_gallery_is_narrowed_by_keyboard(browser: Any, page_url: str) -> None:
    from selenium.webdriver.common.by import By

    browser.get(page_url)
    browser.find_element(By.CSS_SELECTOR, "#gallery-filter [name=fate]").send_keys("dropped")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#gallery li[data-fate]')]"
        ".filter(c => c.offsetParent !== null).map(c => c.dataset.fate)"
    )
    assert shown
    assert set(shown) == {"dropped"}
    count = browser.execute_script("return document.getElementById('gallery-count').textContent")
    assert count == f"{len(shown)} pictures"


def test_page_can_be_read_aloud(browser: Any, page_url: str) -> None:
    browser.get(page_url)
    nameless = browser.execute_script(
        """return [...document.querySelectorAll('svg,img,nav,[role=img],[role=region]')].filter(e =>
            !(e.getAttribute('aria-label') || e.alt ||
              document.getElementById((e.getAttribute('aria-labelledby') || '').split(' ')[0])
            )).map(e => e.outerHTML)"""
    )
    assert nameless == []
    ids = re.findall(r'\bid="([^"]+)"', browser.page_source)
    assert len(ids) == len(set(ids))
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])"
    )
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.execute_script(
        "return [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )


def _requested(browser: Any) -> list[str]:
    """URLs of everything that the last page asked for, data: URIs aside."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [params["request"]["url"] for params in sent]
    return [url for url in urls if not url.startswith("data:")]


def _luminance(browser: Any, css_property: str) -> float:
    """Relative luminance of one of the body's colours (WCAG)."""
    css = browser.execute_script(f"return getComputedStyle(document.body).{css_property}")
    channels = [int(part) / 255 for part in re.findall(r"\d+", css)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
