"""`report.json` and the curves of a run, read from its own `metrics.jsonl` so that a resumed run reports whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gigatok_jax.data.shards import write_json
from gigatok_jax.evals.grid import curves_picture
from gigatok_jax.metrics.writers import read_metrics


def write_report(workdir: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Writes `report.json` (the facts, first and last scores and loss terms) and `curves.png`.

    Returns:
      The paths a person wants next: the newest grid, the curves, the report.
    """
    series = read_metrics(workdir / "metrics.jsonl")

    def ends(name: str) -> tuple[float | None, float | None]:
        values = series[name][1] if name in series else np.zeros(0)
        return (float(values[0]), float(values[-1])) if len(values) else (None, None)

    path = workdir / "report.json"
    # A run that was already finished has measured nothing this time: what it said before stays.
    try:
        before = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:  # cut short by a kill
        before = {}
    report = {name: before.get(name) if value is None else value for name, value in facts.items()}
    report["bad_records"] = {**before.get("bad_records", {}), **facts["bad_records"]}
    scores = {name.removeprefix("eval/"): ends(name) for name in series if name.startswith("eval/")}
    if "psnr" in scores:
        report["psnr_first"], report["psnr_last"] = scores.pop("psnr")
    report |= {{"usage": "codebook_usage"}.get(name, name): last for name, (_, last) in scores.items()}
    if "codebook/usage" in series:
        report["codebook_usage_training_window"] = ends("codebook/usage")[1]
    report["skipped_updates"] = ends("skipped")[1]
    terms = sorted(name for name in series if name.startswith("loss/"))
    report["losses"] = {name.removeprefix("loss/"): dict(zip(("first", "last"), ends(name))) for name in terms}
    write_json(path, report)
    likelihoods = sorted(name for name in series if name.startswith("eval/") and name.endswith("_val_loss"))
    shown = ("eval/psnr", "eval/ssim", "eval/rfid", "codebook/usage", *likelihoods, "accuracy")
    keys = [*terms, *(name for name in shown if name in series)]
    pictures = sorted((workdir / "grids").glob("*.png"))[-1:]
    if keys:  # a run that was stopped while starting up has nothing to draw
        curves_picture(workdir / "metrics.jsonl", workdir / "curves.png", keys)
        pictures.append(workdir / "curves.png")
    return [*pictures, path]
