"""The pictures of `demo_rounds.py`: figures by round with their intervals, and what each round said of a few images."""

import base64
from html import escape
from typing import Any

from storage import Lake, query, read_image

FIGURES = (
    ("distinct_share", None, None, "different captions"),
    ("matched_share", None, None, "captions the filter matches"),
    ("share_kept_synthetic", None, None, "synthetic texts kept"),
    ("best_mean_recall", "mean_recall_low", "mean_recall_high", "mean recall of the new model"),
)
COLOURS = {"promoted": "#1a7f37", "refused": "#c62828", "needs a person": "#b26a00"}
PANEL, HEIGHT, TOP, BOTTOM = 220, 190, 40, 34
STYLE = "font-family='system-ui, sans-serif' font-size='12'"

SHEET_SQL = """
SELECT v.round, v.image_id, v.caption, v.itm_prob, v.kept, v.shard, v."offset", v.size
FROM verdicts v
WHERE v.source = 'synthetic' AND v.image_id IN (
    SELECT image_id FROM verdicts WHERE source = 'synthetic'
    GROUP BY image_id HAVING count(DISTINCT round) = $rounds ORDER BY md5(image_id) LIMIT 4
)
ORDER BY md5(v.image_id), v.round
"""


def figures_svg(rows: list[dict[str, Any]]) -> str:
    """One panel for each figure, a point for each round, in the colour of its verdict."""
    panels = [_panel(place, rows, *figure) for place, figure in enumerate(FIGURES)]
    width = PANEL * len(FIGURES)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {HEIGHT}' {STYLE} role='img' "
        f"aria-label='figures of each round'><rect width='100%' height='100%' fill='white'/>"
        f"{''.join(panels)}</svg>\n"
    )


def _panel(
    place: int,
    rows: list[dict[str, Any]],
    name: str,
    low_name: str | None,
    high_name: str | None,
    title: str,
) -> str:
    left, right = place * PANEL + 34, (place + 1) * PANEL - 14
    floor, ceiling = HEIGHT - BOTTOM, TOP
    drawn = [f"<text x='{left}' y='22' fill='#222'>{escape(title)}</text>"]
    for tick in (0.0, 0.5, 1.0):
        y = floor - tick * (floor - ceiling)
        drawn.append(
            f"<line x1='{left}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>"
            f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor='end' fill='#666'>{tick:g}</text>"
        )
    for index, row in enumerate(rows):
        x = left + (index + 0.5) * (right - left) / len(rows)
        colour = COLOURS.get(row["status"], "#555")
        drawn.append(
            f"<text x='{x:.1f}' y='{floor + 18}' text-anchor='middle' fill='#666'>{row['round']}</text>"
        )
        if row[name] is None:
            continue
        y = floor - row[name] * (floor - ceiling)
        if low_name and high_name and row[low_name] is not None:
            ends = [floor - row[end] * (floor - ceiling) for end in (low_name, high_name)]
            drawn.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{ends[0]:.1f}' y2='{ends[1]:.1f}' "
                f"stroke='{colour}' stroke-width='2'/>"
            )
        drawn.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{colour}'>"
            f"<title>round {row['round']}, {row['status']}: {row[name]:.3f}</title></circle>"
        )
    return "".join(drawn)


def caption_sheet(lake: Lake, rounds: int) -> str:
    """Four images down, and beside each what every round's captioner said and its filter thought."""
    rows = query(lake, SHEET_SQL, {"rounds": rounds}).to_pylist()
    images: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        images.setdefault(row["image_id"], []).append(row)
    drawn, line, side = [], 20, 88
    for place, said in enumerate(images.values()):
        top = 10 + place * (side + 12)
        first = said[0]
        data = read_image(lake, first["shard"], first["offset"], first["size"])
        jpeg = base64.b64encode(data).decode()
        drawn.append(
            f"<image x='10' y='{top}' width='{side}' height='{side}' href='data:image/jpeg;base64,{jpeg}'/>"
        )
        for row in said:
            y = top + 14 + (row["round"] - 1) * line
            colour = COLOURS["promoted" if row["kept"] else "refused"]
            prob = "-" if row["itm_prob"] is None else f"{row['itm_prob']:.2f}"
            word = "kept" if row["kept"] else "dropped"
            drawn.append(
                f"<text x='{side + 24}' y='{y}'>round {row['round']}: {escape(row['caption'])} "
                f"<tspan fill='{colour}'>{word}, itm_prob {prob}</tspan></text>"
            )
    height = 10 + len(images) * (side + 12)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 620 {height}' {STYLE} role='img' "
        f"aria-label='captions of each round'><rect width='100%' height='100%' fill='white'/>"
        f"{''.join(drawn)}</svg>\n"
    )
