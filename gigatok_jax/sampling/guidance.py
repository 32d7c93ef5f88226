"""Classifier-free guidance scales by position: logits = null + scale · (class − null)."""

import numpy as np

SCHEDULES = ("constant", "linear", "linear_reversed", "triangular", "rectangular", "step", "cosine")


def scales(
    schedule: str,
    scale: float,
    num_tokens: int,
    *,
    start: float | None = None,
    end: float = 1.0,
    peak: float = 0.5,
    interval: int = -1,
) -> np.ndarray:
    """The guidance scale of every id of a sequence, as GigaTok's sampler has them.

    The first id always has the full scale. Id i ≥ 1 has it at the ratio r = i / (K − 1): "constant"; "linear" from 1
    to the scale; "linear_reversed"; "triangular", up to `peak` and down; "rectangular", the scale where
    start ≤ r ≤ end (start 0.05 by default) and 1 elsewhere; "step", the scale from start on (0.18 by default);
    "cosine", from the scale to 1. The published code adds 1e-4 wherever a schedule falls to 1; that is left out, so
    that a remainder without guidance is one.

    Args:
      num_tokens: K.
      interval: ids after number `interval` + 1 have no guidance; −1 puts no end to it.

    Returns:
      (K,) float32.

    Raises:
      ValueError: for an unknown schedule, or a scale, start, end or peak out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if scale < 1:
        raise ValueError(f"guidance scale {scale} must be at least 1 (1 is no guidance)")
    start = {"rectangular": 0.05}.get(schedule, 0.18) if start is None else start
    if not (0 <= start <= end and 0 < peak < 1 and interval >= -1):
        raise ValueError(
            f"guidance wants 0 <= start={start} <= end={end}, 0 < peak={peak} < 1, interval={interval} >= -1"
        )
    steps = np.arange(num_tokens)
    r = steps / max(num_tokens - 1, 1)
    share = {
        "constant": np.ones(num_tokens),
        "linear": r,
        "linear_reversed": 1 - r,
        "triangular": np.where(r < peak, r / peak, (1 - r) / (1 - peak)),
        "rectangular": (start <= r) & (r <= end),
        "step": start <= r,
        "cosine": 0.5 * (1 + np.cos(np.pi * r)),
    }[schedule]
    share = np.where(steps == 0, 1.0, share)
    if interval >= 0:
        share = np.where(steps > interval + 1, 0.0, share)
    return (1 + (scale - 1) * share).astype(np.float32)
