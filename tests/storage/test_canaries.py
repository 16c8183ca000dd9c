"""Human images set aside to audit filters with."""

import pytest
from rounds_of_rows import BASIS, caption, image, pair

from storage import ConfigError, Lake, StaleOutput, build_trainset, query
from storage.canaries import CanaryDraw, draw_canaries, images_needed
from storage.tables import commit_part, rows_table

HALF = CanaryDraw(share=0.5, max_images=100)


def take_in(lake: Lake, numbers: range, *, part: str, pool: str = "human") -> None:
    pairs = [pair(i, pool=pool) | {"shard": part} for i in numbers]
    captions = [caption(f"{pool}{i}", i, "human", 0) for i in numbers]
    commit_part(lake, "pairs", part, rows_table("pairs", pairs), basis=BASIS)
    if pool != "web":
        rows = rows_table("captions", captions)
        commit_part(lake, "captions", part, rows, round=0, basis=BASIS)


def canaries(lake: Lake) -> set[str]:
    rows = query(lake, "SELECT image_id FROM canary_draws WHERE is_canary").column(0)
    return set(rows.to_pylist())


def test_draw_takes_about_its_share_and_leaves_the_view_human(lake: Lake) -> None:
    take_in(lake, range(200), part="human-a")
    draw_canaries(lake, 1, HALF)
    kept_out = canaries(lake)
    assert 70 < len(kept_out) < 130
    human = set(query(lake, "SELECT image_id FROM human").column(0).to_pylist())
    assert human == {image(i) for i in range(200)} - kept_out


def test_draw_made_again_is_found_and_other_settings_are_refused(lake: Lake) -> None:
    take_in(lake, range(30), part="human-a")
    first = draw_canaries(lake, 1, HALF)
    assert draw_canaries(lake, 1, HALF) == first
    with pytest.raises(StaleOutput, match=r"config.share: 0.5 -> 0.2"):
        draw_canaries(lake, 1, CanaryDraw(share=0.2, max_images=100))


def test_images_of_a_later_round_are_drawn_then_and_earlier_ones_stay(lake: Lake) -> None:
    take_in(lake, range(40), part="human-a")
    draw_canaries(lake, 1, HALF)
    before = canaries(lake)
    take_in(lake, range(40, 80), part="human-b")
    draw_canaries(lake, 2, CanaryDraw(share=0.9, max_images=100))
    later = canaries(lake) - before
    assert later <= {image(i) for i in range(40, 80)}
    assert len(later) > 25
    assert query(lake, "SELECT count(*) FROM canary_draws").column(0)[0].as_py() == 80


def test_cap_counts_all_rounds(lake: Lake) -> None:
    take_in(lake, range(40), part="human-a")
    draw_canaries(lake, 1, CanaryDraw(share=0.9, max_images=10))
    take_in(lake, range(40, 80), part="human-b")
    draw_canaries(lake, 2, CanaryDraw(share=0.9, max_images=12))
    assert len(canaries(lake)) == 12


def test_what_models_may_have_seen_is_never_drawn(lake: Lake) -> None:
    take_in(lake, range(40), part="human-a")
    model = {"model_id": "m", "role": "med", "round": 0, "path": "models/m", "config": "{}"}
    commit_part(lake, "models", "med-m", rows_table("models", [model]), round=0, basis=BASIS)
    draw_canaries(lake, 1, HALF)
    assert canaries(lake) == set()


def test_image_that_the_web_shows_too_is_not_trained_on_there_either(lake: Lake) -> None:
    take_in(lake, range(40), part="human-a")
    take_in(lake, range(40), part="web-0001-00-00000", pool="web")
    web = [caption(f"w{i}", i, "web", 0) for i in range(40)]
    rows = rows_table("captions", web)
    commit_part(lake, "captions", "web-0001-00-00000", rows, round=0, basis=BASIS)
    draw_canaries(lake, 1, HALF)
    shown = set(query(lake, "SELECT image_id FROM raw").column(0).to_pylist())
    assert canaries(lake)
    assert not shown & canaries(lake)
    with pytest.raises(ConfigError, match="show held-out or canary images"):
        build_trainset(
            lake, "SELECT image_id, caption, source FROM captions WHERE round = 0", name="leak"
        )


def test_share_of_nought_sets_none_aside(lake: Lake) -> None:
    take_in(lake, range(40), part="human-a")
    draw_canaries(lake, 1, CanaryDraw(share=0.0, max_images=10))
    assert canaries(lake) == set()


def test_lake_without_human_images_has_no_draw(lake: Lake) -> None:
    assert draw_canaries(lake, 1, HALF) is None


@pytest.mark.parametrize(("share", "max_images"), [(1.0, 5), (-0.1, 5), (0.1, -1)])
def test_draw_refuses_values_out_of_range(share: float, max_images: int) -> None:
    with pytest.raises(ConfigError):
        CanaryDraw(share=share, max_images=max_images)


def test_images_needed_shrink_with_the_interval() -> None:
    assert images_needed(0.1) == 97
    assert images_needed(0.05) == 385
