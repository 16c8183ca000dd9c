"""A few rows of a list, taken in for real and thrown away, tell what the whole will give."""

import random
from pathlib import Path

import pytest
from hostile_web import serve
from web_world import write_list

from storage import EmptyInput
from storage.intake.download_config import DownloadConfig
from storage.intake.trial import _drawn, try_list
from storage.intake.url_list import UrlListConfig

CONFIG = DownloadConfig(
    allow_addresses=("127.0.0.1/32",), shard_rows=20, threads=4, retry_passes=0, timeout_s=8.0
)


def test_trial_counts_what_its_rows_gave_and_keeps_nothing(tmp_path: Path) -> None:
    with serve() as web:
        rows = [(web.url(f"ok.jpg?n={n}"), f"picture {n}") for n in range(30)]
        rows += [(web.url(f"gone.jpg?n={n}"), "gone") for n in range(30)]
        url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows)))
        trial = try_list(url_list, CONFIG, 24)
        asked = {path for path in web.requests if path != "/robots.txt"}
    assert (trial.num_listed, trial.num_tried) == (60, 24)
    assert trial.outcomes.total() == len(asked) == 24
    assert trial.num_ok == sum(path.startswith("/ok") for path in asked)
    assert trial.outcomes["http_4xx"] == 24 - trial.num_ok > 0
    assert trial.reasons == {"http_4xx": "410 Gone"}
    assert trial.image_bytes > 500 * trial.num_ok > 0
    assert [path.name for path in tmp_path.iterdir()] == ["urls.parquet"]


def test_trial_of_dead_links_says_so_without_failing(tmp_path: Path) -> None:
    with serve() as web:
        rows = [(web.url(f"gone.jpg?n={n}"), "gone") for n in range(5)]
        url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows)))
        trial = try_list(url_list, CONFIG, 100)
    assert (trial.num_listed, trial.num_tried, trial.num_ok) == (5, 5, 0)


def test_trial_of_an_empty_list_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "urls.csv"
    path.write_text("url,alt_text\n")
    with pytest.raises(EmptyInput, match="has no row"):
        try_list(UrlListConfig(path=str(path)), CONFIG, 10)


def test_rows_of_the_whole_list_are_equally_likely(tmp_path: Path) -> None:
    path = tmp_path / "urls.csv"
    path.write_text("url,alt_text\n" + "".join(f"http://a.test/{n},x\n" for n in range(50)))
    counts = [0] * 50
    for seed in range(400):
        drawn, listed = _drawn(UrlListConfig(path=str(path)), 10, random.Random(seed))
        positions = [row.position for row in drawn]
        assert listed == 50
        assert positions == sorted(set(positions))
        for position in positions:
            counts[position] += 1
    # 80 expected of each, standard deviation 8.
    assert 48 <= min(counts) <= max(counts) <= 112
