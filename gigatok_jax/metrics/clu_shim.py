"""Lets `clu.metric_writers` import where TensorFlow is not installed.

One file of clu 0.0.12, `metric_writers/tf/summary_writer.py`, imports TensorFlow at module level. A stand-in
under that name in `sys.modules`, placed before clu is imported, is found instead of the file.
"""

import importlib.util
import sys
import types

_MODULE = "clu.metric_writers.tf.summary_writer"


def install() -> bool:
    """Puts the stand-in in place. Does nothing where TensorFlow can be imported, or on a second call.

    Returns:
      Whether clu's own summary writer is replaced.
    """
    if isinstance(sys.modules.get(_MODULE), _StandIn):
        return True
    if _MODULE in sys.modules or _can_import("tensorflow"):
        return False
    sys.modules[_MODULE] = _StandIn(_MODULE, "TensorBoard writer without TensorFlow.")
    return True


class _StandIn(types.ModuleType):
    @staticmethod
    def SummaryWriter(logdir: str):
        # Imported at the call: the writer's base class lives in the package that is being imported around us.
        from gigatok_jax.metrics.writers import TensorBoardWriter

        return TensorBoardWriter(logdir)


def _can_import(name: str) -> bool:
    """Whether `name` would be found. Only looks: importing TensorFlow to find out would take many seconds."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a stub in sys.modules without a spec
        return False
