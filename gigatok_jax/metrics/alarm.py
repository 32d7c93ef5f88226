"""An alarm for a vector-quantised bottleneck that stops using its codebook."""

import math

_MESSAGE = (
    "codebook usage is {usage:.3g} and has been below {threshold:g} since step {since} ({steps} steps): "
    "the bottleneck keeps choosing the same few entries. Usual cause: the entropy loss weight is too small. "
    "Raise it (for example tenfold) and restart from a checkpoint before step {since}; a collapsed codebook "
    "rarely recovers by itself."
)


class UsageAlarm:
    """Says once that codebook usage has collapsed, and is quiet until it has recovered and fallen again."""

    def __init__(self, threshold: float = 0.1, patience_steps: int = 1000, *, window_steps: int = 0):
        """
        Args:
          threshold: usage, a fraction in [0,1], under which the codebook counts as collapsed.
          patience_steps: steps that usage must stay below the threshold; a short dip is normal at the start.
          window_steps: steps over which usage is counted. Before that step the window is not full and usage
            is low for lack of samples, so earlier values are passed over.
        """
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold is a fraction in (0, 1], got {threshold}")
        self._threshold, self._patience, self._window = threshold, patience_steps, window_steps
        self._below_since: int | None = None
        self._told = False

    def check(self, step: int, usage: float) -> str | None:
        """Takes the usage of one step and returns a message when it is time for one, otherwise None.

        A usage that is not a number changes nothing: a broken loss has an alarm of its own.
        """
        usage = float(usage)
        if step < self._window or math.isnan(usage):
            return None
        if usage >= self._threshold:
            self._below_since, self._told = None, False
            return None
        if self._below_since is None:
            self._below_since = step
        below = step - self._below_since
        if self._told or below < self._patience:
            return None
        self._told = True
        return _MESSAGE.format(usage=usage, threshold=self._threshold, since=self._below_since, steps=below)
