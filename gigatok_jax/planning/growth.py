"""How a step keeps up as chips are added, each with the same rows: what they send, and what is left of their speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_INK, _BLUE, _GREEN, _PALE = (32, 36, 44), (31, 98, 178), (84, 150, 96), (225, 228, 234)
_LEFT, _WIDTH, _ROW = 180, 560, 66


def growth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each plan that fits, by chips: "sent_mib" a chip and step, "images_per_second" of all chips, projected, and
    "efficiency", a chip's images a second against those of the plan with the fewest, where all overlaps and "in_turn".
    """
    rows = sorted((row for row in rows if row["fits"]), key=lambda row: row["chips"])

    def rate(row: Mapping[str, Any], suffix: str = "") -> float:
        return row["images"] / row[f"projected_step_seconds{suffix}"] / row["chips"]

    return [
        {
            "topology": row["topology"],
            "chips": row["chips"],
            "images": row["images"],
            "sent_mib": row["collective_bytes_per_step"] / 2**20,
            "images_per_second": rate(row) * row["chips"],
            "efficiency": rate(row) / rate(rows[0]),
            "efficiency_in_turn": rate(row, "_in_turn") / rate(rows[0], "_in_turn"),
        }
        for row in rows
    ]


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """A line per point."""
    lines = ["chips  topology   batch  MiB sent  images/s  efficiency, projected (in turn)"]
    lines += [
        f"{one['chips']:5d}  {one['topology']:9s} {one['images']:6d}  {one['sent_mib']:8.0f}  "
        f"{one['images_per_second']:8.0f}  {one['efficiency']:.1%} ({one['efficiency_in_turn']:.1%})"
        for one in points
    ]
    return "\n".join(lines)


def picture(points: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Bars of efficiency, against 100 %, and of what a chip sends, against the most."""
    image = Image.new("RGB", (_LEFT + _WIDTH + 190, 20 + _ROW * len(points)), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    most = max(one["sent_mib"] for one in points) or 1.0
    for n, one in enumerate(points):
        top = 14 + n * _ROW
        draw.text((10, top + 4), f"{one['chips']} chips, {one['topology']}", _INK, font)
        said = f"{one['efficiency']:.0%}, in turn {one['efficiency_in_turn']:.0%}"
        for bar, (share, colour, text) in enumerate(
            [(one["efficiency"], _BLUE, said), (one["sent_mib"] / most, _GREEN, f"{one['sent_mib']:.0f} MiB sent")]
        ):
            low = top + 26 * bar
            draw.rectangle((_LEFT, low, _LEFT + _WIDTH, low + 20), _PALE)
            draw.rectangle((_LEFT, low, _LEFT + _WIDTH * min(share, 1.0), low + 20), colour)
            draw.text((_LEFT + _WIDTH + 8, low + 2), text, _INK, font)
    return image
