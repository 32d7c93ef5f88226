"""A plan as a picture: each program's memory against the chip's, and what its projected step is made of."""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_COLOURS = {
    "params": (31, 98, 178),
    "opt": (120, 160, 210),
    "ema": (178, 205, 236),
    "frozen": (140, 140, 150),
    "other": (200, 204, 212),
    "temporaries": (214, 137, 64),
    "compute": (31, 98, 178),
    "memory": (214, 137, 64),
    "links": (84, 150, 96),
}
_WIDTH, _BAR, _LABEL, _INK = 760, 22, 190, (32, 36, 44)
_ROW = 5 * (_BAR + 8)


def picture(rows: list[Mapping[str, Any]]) -> Image.Image:
    """Per program: GiB a device up to the chip's memory, and milliseconds of each thing that may bound its step."""
    image = Image.new("RGB", (_LABEL + _WIDTH + 120, 30 + len(rows) * _ROW), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    top = 14
    for row in rows:
        draw.text((10, top), f"{row['program']}  {row['topology']}", _INK, font)
        parts, limit = _memory(row), row["hbm_gib_limit"]
        _bar(draw, font, top + _BAR, "GiB a device", parts, max(limit, sum(parts.values())), limit)
        if "projected_seconds" in row:
            _times(draw, font, top + 2 * (_BAR + 6), row["projected_seconds"])
        top += _ROW
    return image


def _memory(row: Mapping[str, Any]) -> dict[str, float]:
    """GiB by what holds them; arguments that have no name of their own are "other"."""
    held = {**row["argument_bytes"].get("state", {}), "frozen": sum(row["argument_bytes"].get("frozen", {}).values())}
    parts = {name: held.get(name, 0) / 2**30 for name in ("params", "opt", "ema", "frozen")}
    rest = row["hbm_gib_per_device"] - sum(parts.values())
    temporaries = row["memory"].get("temporaries", max(rest, 0.0) * 2**30) / 2**30
    return {**parts, "other": max(rest - temporaries, 0.0), "temporaries": temporaries}


def _times(draw: Any, font: Any, top: int, seconds: Mapping[str, float]) -> None:
    for name, value in seconds.items():
        draw.text((10, top), f"{name}, projected", _INK, font)
        right = _LABEL + _WIDTH * value / max(seconds.values())
        draw.rectangle((_LABEL, top, right, top + _BAR - 4), _COLOURS[name])
        draw.text((right + 6, top), f"{1e3 * value:.3g} ms", _INK, font)
        top += _BAR


def _bar(draw: Any, font: Any, top: int, name: str, parts: Mapping[str, float], full: float, limit: Any) -> None:
    draw.text((10, top + 3), name, _INK, font)
    left = float(_LABEL)
    for part, value in parts.items():
        width = _WIDTH * value / full if full else 0.0
        draw.rectangle((left, top, left + width, top + _BAR), _COLOURS[part])
        if width > 8 * (len(part) + 6):
            draw.text((left + 4, top + 3), f"{part} {value:.3g}", (255, 255, 255), font)
        left += width
    draw.text((left + 6, top + 3), f"{sum(parts.values()):.3g}", _INK, font)
    if limit:
        at = _LABEL + _WIDTH * limit / full
        draw.line((at, top - 3, at, top + _BAR + 3), (190, 40, 40), 3)
