"""Pictures of a run: originals over reconstructions, and training curves. Drawn with Pillow alone."""

import functools
import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gigatok_jax.metrics import read_metrics
from gigatok_jax.metrics.progress import format_number

_PAPER, _INK, _FAINT, _RULE = (255, 255, 255), (32, 36, 44), (120, 126, 138), (214, 218, 226)
_LINE, _RAW = (31, 98, 178), (178, 205, 236)
_MIN_TILE = 96  # pixels; smaller images are magnified to at least this
_GUTTER, _PAIR_GAP, _MARGIN = 2, 8, 12
# Pillow's own font lacks these; it needs no font file on the machine.
_SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "≈": "~", "≤": "<=", "≥": ">="})
_INSET = 5  # between a curve and its frame


def comparison_grid(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    *,
    columns: int = 8,
    caption: str | None = None,
    scale: int | None = None,
    scores: bool = True,
) -> Image.Image:
    """Lays out pairs: each original over its reconstruction, with the pair's PSNR below.

    Args:
      originals: uint8 (N,H,W,3).
      reconstructions: uint8 (N,H,W,3).
      columns: pairs in a row; fewer if there are fewer images.
      caption: text above the pictures, for example mean scores; long text is wrapped.
      scale: whole-number magnification by repeated pixels, so that nothing is smoothed. By default as much as
        makes the shorter side at least 96 pixels.
      scores: whether to print each pair's PSNR.

    Returns:
      An RGB picture.

    Raises:
      ValueError: for unequal shapes, another dtype or rank, or no images.
    """
    if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[-1] != 3:
        raise ValueError(f"need two arrays (N,H,W,3), got {originals.shape} and {reconstructions.shape}")
    if originals.dtype != np.uint8 or reconstructions.dtype != np.uint8 or not len(originals):
        raise ValueError(f"need uint8 images, got {len(originals)} of {originals.dtype}, {reconstructions.dtype}")
    scale = scale or math.ceil(_MIN_TILE / min(originals.shape[1:3]))
    height, width = originals.shape[1] * scale, originals.shape[2] * scale
    columns = min(columns, len(originals))
    rows = math.ceil(len(originals) / columns)
    pair_height = 2 * height + _GUTTER + (16 if scores else 0)
    total_width = 2 * _MARGIN + columns * width + (columns - 1) * _PAIR_GAP
    lines = _wrap(caption, _font(15), total_width - 2 * _MARGIN) if caption else []
    top = _MARGIN + 20 * len(lines) + (6 if lines else 0)
    page = Image.new("RGB", (total_width, top + rows * (pair_height + _PAIR_GAP) - _PAIR_GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 20 * i), line, fill=_INK, font=_font(15))
    for i, (original, reconstruction) in enumerate(zip(originals, reconstructions)):
        row, column = divmod(i, columns)
        x, y = _MARGIN + column * (width + _PAIR_GAP), top + row * (pair_height + _PAIR_GAP)
        page.paste(_magnify(original, scale), (x, y))
        page.paste(_magnify(reconstruction, scale), (x, y + height + _GUTTER))
        if scores:
            text = _pair_psnr(original, reconstruction)
            draw.text((x + width / 2, y + pair_height), text, fill=_FAINT, font=_font(11), anchor="md")
    return page


def picture_grid(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Lays out pictures, each over its caption, magnified by repeated pixels to at least 96 on the shorter side.

    Args:
      images: uint8 (N,H,W,3).
      captions: one for each, "" for none.
    """
    scale = math.ceil(_MIN_TILE / min(images.shape[1:3]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    columns, line = min(columns, len(images)), 16 if any(captions) else 0
    rows, step_x, step_y = math.ceil(len(images) / columns), width + _PAIR_GAP, height + line + _PAIR_GAP
    size = 2 * _MARGIN + columns * step_x - _PAIR_GAP, 2 * _MARGIN + rows * step_y - _PAIR_GAP
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _MARGIN + i % columns * step_x, _MARGIN + i // columns * step_y
        page.paste(_magnify(image, scale), (x, y))
        letters = max(1, width // 6)  # of the small font that fit
        draw.text((x + width / 2, y + height + line), caption[:letters], fill=_FAINT, font=_font(11), anchor="md")
    return page


def curves_picture(
    jsonl_path: str | os.PathLike,
    out_png: str | os.PathLike,
    keys: Sequence[str],
    *,
    columns: int = 3,
    log_y: Sequence[str] = (),
    title: str | None = None,
) -> Image.Image:
    """Draws training curves from a `metrics.jsonl`, one small panel for each key, and saves them as PNG.

    A panel shows the range of the values and of the steps, and the last value. Of more than 60 values a
    running mean is drawn over the single ones. Values that are not finite, or not positive under `log_y`, are
    left out.

    Args:
      jsonl_path: file written by `gigatok_jax.metrics.JsonlWriter`.
      out_png: where to save.
      keys: scalar names. One that was never written gets an empty panel.
      columns: panels in a row.
      log_y: the keys drawn on a logarithmic axis.
      title: text above the panels.

    Returns:
      The RGB picture.

    Raises:
      ValueError: none of the keys is in the file.
    """
    curves = read_metrics(jsonl_path, keys)
    if not curves:
        raise ValueError(f"none of {list(keys)} in {os.fspath(jsonl_path)}: it has {sorted(read_metrics(jsonl_path))}")
    columns = min(columns, len(keys))
    panel_width, panel_height = 340, 210
    top = _MARGIN + (26 if title else 0)
    size = (
        columns * panel_width + 2 * _MARGIN,
        math.ceil(len(keys) / columns) * panel_height + top + _MARGIN,
    )
    page = Image.new("RGB", size, _PAPER)
    if title:
        ImageDraw.Draw(page).text((_MARGIN + 8, _MARGIN), title, fill=_INK, font=_font(17))
    for i, key in enumerate(keys):
        row, column = divmod(i, columns)
        panel = _panel(key, curves.get(key), (panel_width, panel_height), key in log_y)
        page.paste(panel, (_MARGIN + column * panel_width, top + row * panel_height))
    page.save(out_png)
    return page


def _panel(name: str, curve, size: tuple[int, int], log: bool) -> Image.Image:
    """One chart: title and last value above a frame, the ranges of both axes along it."""
    width, height = size
    panel = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(panel)
    left, top, right, bottom = 62, 34, width - 14, height - 30
    draw.text((left, 26), name + (" (log)" if log else ""), fill=_INK, font=_font(13), anchor="ls")
    steps, values = _drawable(curve, log)
    if not len(values):
        draw.rectangle((left, top, right, bottom), outline=_RULE)
        draw.text(((left + right) / 2, (top + bottom) / 2), "no values", fill=_FAINT, font=_font(12), anchor="mm")
        return panel
    draw.text((right, 26), f"last {format_number(values[-1])}", fill=_LINE, font=_font(12), anchor="rs")
    heights = np.log10(values) if log else values
    low, high = _limits(heights)
    first, last = int(steps[0]), int(steps[-1])
    for y, value in ((top + _INSET, high), (bottom - _INSET, low)):
        label = format_number(10**value if log else value)
        draw.text((left - 6, y), label, fill=_FAINT, font=_font(11), anchor="rm")
    draw.text((left, bottom + 6), f"{first:,}", fill=_FAINT, font=_font(11), anchor="lt")
    if last > first:
        draw.text((right, bottom + 6), f"{last:,}", fill=_FAINT, font=_font(11), anchor="rt")
        draw.text(((left + right) / 2, bottom + 6), "step", fill=_FAINT, font=_font(11), anchor="mt")
    x = (steps - first) / max(last - first, 1)
    y = (high - heights) / (high - low)
    panel.paste(_plot(x, y, right - left, bottom - top), (left, top))
    return panel


def _plot(x: np.ndarray, y: np.ndarray, width: int, height: int) -> Image.Image:
    """Frame and curve from coordinates in [0,1]. Pillow's lines are jagged, so it is drawn large, then reduced."""
    zoom, inset = 4, _INSET
    canvas = Image.new("RGB", (width * zoom, height * zoom), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for part in (0.25, 0.5, 0.75):
        draw.line((0, part * height * zoom, width * zoom, part * height * zoom), fill=(238, 240, 244), width=zoom)
    draw.line((0, 0, 0, height * zoom), fill=_RULE, width=2 * zoom)
    draw.line((0, height * zoom, width * zoom, height * zoom), fill=_RULE, width=2 * zoom)

    def points(y):
        return [
            ((inset + u * (width - 2 * inset)) * zoom, (inset + v * (height - 2 * inset)) * zoom) for u, v in zip(x, y)
        ]

    many = len(x) > 60
    draw.line(points(y), fill=_RAW if many else _LINE, width=zoom if many else 2 * zoom, joint="curve")
    if many:
        draw.line(points(_running_mean(y, len(y) // 30)), fill=_LINE, width=2 * zoom, joint="curve")
    if len(x) <= 30:
        for u, v in points(y):
            draw.ellipse((u - 2.5 * zoom, v - 2.5 * zoom, u + 2.5 * zoom, v + 2.5 * zoom), fill=_LINE)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of `window` neighbours, of fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def _drawable(curve, log: bool) -> tuple[np.ndarray, np.ndarray]:
    if curve is None:
        return np.zeros(0), np.zeros(0)
    steps, values = curve
    keep = np.isfinite(values) & ((values > 0) | (not log))
    return steps[keep], values[keep]


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    # A constant still needs an axis with an extent.
    return (low, high) if high > low else (low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1)


def _pair_psnr(a: np.ndarray, b: np.ndarray) -> str:
    mse = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return "exact" if mse == 0 else f"{10.0 * math.log10(255.0**2 / mse):.1f} dB"


def _magnify(image: np.ndarray, scale: int) -> Image.Image:
    return Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))


def _wrap(text: str, font, width: int) -> list[str]:
    """Breaks at spaces so that lines fit; a newline in the text stays one."""
    lines = []
    text = text.translate(_SPELLED)
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


@functools.cache
def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
