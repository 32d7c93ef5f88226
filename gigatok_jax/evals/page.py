"""One self-contained HTML page about a tokenizer, the generator of its ids and how both were made."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigatok_jax.metrics import format_duration

Picture = Image.Image | Path

LOSSES = {"ar_val_loss": "held-out id", "masked_val_loss": "masked id of held-out images"}  # nats per what

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1d2129; --faint: #667080; --rule: #dfe3e9;
  --mark: #1f62b2; --mark-soft: #dce8f6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e6e9ee; --faint: #98a2b1;
  --rule: #31363f; --mark: #7fb2ee; --mark-soft: #24364d; } .chart { filter: invert(.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 44px 0 6px; }
p { margin: 0 0 12px; max-width: 68ch; text-wrap: pretty; } p, figcaption { color: var(--faint); }
.row { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
.tile, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0; }
.tile { padding: 14px 16px; } .tile b { display: block; font-size: 1.6rem; line-height: 1.25; }
.tile span { display: block; } .tile small { color: var(--faint); }
figure { padding: 12px; } figcaption { font-size: .9rem; margin-top: 8px; } figcaption b { color: var(--ink); }
img, svg { display: block; width: 100%; height: auto; border-radius: 4px; }
.wide { min-width: 640px; } figure { overflow-x: auto; }
.area { fill: var(--mark-soft); stroke: var(--mark); } .level { stroke: var(--faint); stroke-dasharray: 5 5; }
.level, .area { vector-effect: non-scaling-stroke; }
ol { list-style: none; margin: 0; padding: 0; } li { border-top: 1px solid var(--rule); padding: 10px 0; }
li div { display: flex; justify-content: space-between; gap: 12px; }
code { display: block; margin-top: 4px; font: .82rem/1.5 ui-monospace, monospace; color: var(--faint);
  overflow-wrap: anywhere; }
code span { display: inline-block; }
"""


def write_page(
    path: Path,
    *,
    title: str,
    report: Mapping[str, Any],
    reconstructions: Picture | None,
    drawn: Sequence[tuple[str, str, Picture]],
    curves: Sequence[tuple[str, Picture]],
    counts_V: np.ndarray,
    stages: Sequence[tuple[str, float | None, str]],
) -> None:
    """Writes the page; everything it shows lies in it.

    Args:
      title: what the run is called.
      report: a tokenizer's `report.json`, with one of `LOSSES` and "unigram_entropy".
      reconstructions: held-out images over their reconstructions.
      drawn: (name, what it is, pictures decoded from ids).
      curves: (name, curves).
      counts_V: how often each codebook entry stands in the training ids.
      stages: (name, seconds, command), in order.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{_lead(report)}</p>", _headline(report, stages)]
    if reconstructions is not None:
        text = "Each held-out image over what the tokenizer makes of it, by way of its ids alone."
        parts += [_heading("Reconstructions", text), _figure(reconstructions, kind="wide")]
    parts += [_heading("Images of the generator", _gain(report))]
    parts += [_row(280, [_figure(picture, name, text) for name, text, picture in drawn])]
    parts += [_heading("Codebook use", _use(counts_V)), f"<figure>{_histogram(counts_V)}</figure>"]
    parts += [_heading("Curves"), _row(600, [_figure(picture, name, kind="wide chart") for name, picture in curves])]
    parts += [_heading("How it was made", "Every stage runs by its own command too."), _commands(stages)]
    body = "\n".join(parts)
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<main>
{body}
</main>
</html>
"""
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _headline(report: Mapping[str, Any], stages: Sequence[tuple[str, float | None, str]]) -> str:
    """The figures a reader wants first; those that a run does not have are left out."""
    tiles = []
    if report.get("psnr_last") is not None:
        note = f"painting each in its mean colour: {report['psnr_mean_colour']:.2f} dB"
        tiles.append((f"{report['psnr_last']:.2f} dB", "PSNR of held-out images", note))
    if report.get("codebook_usage") is not None:
        note = f"{report['num_latent_tokens']} ids an image"
        tiles.append((f"{report['codebook_usage']:.0%}", f"of {report['codebook_size']:,} codes in use", note))
    note = f"each position's own distribution: {report['unigram_entropy']:.2f}"
    loss, per = _loss(report)
    tiles.append((f"{loss:.2f} nats", f"per {per}, by the generator", note))
    seconds = sum(seconds or 0 for _, seconds, _ in stages)
    tiles.append((format_duration(seconds), "for all stages", "without installation"))
    tile = '<div class="tile"><b>{}</b><span>{}</span><small>{}</small></div>'
    return _row(150, [tile.format(*texts) for texts in tiles])


def _lead(report: Mapping[str, Any]) -> str:
    size, ids, codes = (report[name] for name in ("image_size", "num_latent_tokens", "codebook_size"))
    return f"An image of {size}×{size} pixels as {ids} ids of {codes:,} codes, and a generator that writes such ids."


def _loss(report: Mapping[str, Any]) -> tuple[float, str]:
    """The generator's loss in nats, and per what."""
    return next((report[name], per) for name, per in LOSSES.items() if name in report)


def _gain(report: Mapping[str, Any]) -> str:
    loss, per = _loss(report)
    gain = report["unigram_entropy"] - loss
    return (
        f"Per {per} the generator needs {gain:.2f} nats less than each position's own distribution of the training "
        "ids; images drawn from that are the shuffled ones."
    )


def _use(counts_V: np.ndarray) -> str:
    used, total = int((counts_V > 0).sum()), int(counts_V.sum())
    share = counts_V[counts_V > 0] / max(total, 1)
    varied = np.exp(-(share * np.log(share)).sum())
    return (
        f"How often each code stands in {total:,} training ids, the most used first; the dashed line is equal use. "
        f"{used:,} of {len(counts_V):,} occur, as varied as {varied:,.0f} in equal use (perplexity)."
    )


def _histogram(counts_V: np.ndarray) -> str:
    """Sorted counts as an area, with the mean as a line."""
    width, height = 1000, 240
    bars = np.sort(counts_V)[::-1].astype(np.float64)
    if len(bars) > width:  # more codes than can be seen
        bars = np.array([part.mean() for part in np.array_split(bars, width)])
    top = max(bars.max(), 1.0)
    y = height - (height - 4) * bars / top
    x = np.linspace(0, width, len(bars) + 1)
    steps = " ".join(f"V{b:.1f} H{a:.1f}" for a, b in zip(x[1:], y))
    level = height - (height - 4) * bars.mean() / top
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" style="height: 220px" role="img" '
        f'aria-label="sorted counts of codes"><path class="area" d="M0 {height} {steps} V{height} Z"/>'
        f'<path class="level" d="M0 {level:.1f} H{width}"/></svg>'
    )


def _commands(stages: Sequence[tuple[str, float | None, str]]) -> str:
    rows = []
    for name, seconds, command in stages:
        time = "" if seconds is None else format_duration(seconds)
        words = " ".join(f"<span>{html.escape(word)}</span>" for word in command.split(" "))  # lines break between them
        rows.append(f"<li><div><b>{html.escape(name)}</b><span>{time}</span></div><code>{words}</code></li>")
    return f"<ol>{''.join(rows)}</ol>"


def _heading(name: str, text: str = "") -> str:
    return f"<h2>{name}</h2>" + (f"<p>{html.escape(text)}</p>" if text else "")


def _row(least: int, parts: Sequence[str]) -> str:
    """Parts side by side where each has `least` pixels, below each other elsewhere."""
    return f'<div class="row" style="--least: {least}px">{"".join(parts)}</div>'


def _figure(picture: Picture, name: str = "", text: str = "", kind: str = "") -> str:
    source, name, text = base64.b64encode(_png(picture)).decode(), html.escape(name), html.escape(text)
    image = f'<img class="{kind}" src="data:image/png;base64,{source}" alt="{name}">'
    caption = f"<figcaption><b>{name}</b> {text}</figcaption>" if name else ""
    return f"<figure>{image}{caption}</figure>"


def _png(picture: Picture) -> bytes:
    if isinstance(picture, Path):
        return picture.read_bytes()
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()
