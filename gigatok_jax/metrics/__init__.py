"""What a run says about itself: metric writers, the progress line, and the alarm for a dying codebook.

Get clu's writer classes through this package (or import it first): `clu.metric_writers` alone does not import
where TensorFlow is missing.
"""

from gigatok_jax.metrics import clu_shim

clu_shim.install()  # must run before anything imports clu.metric_writers

from gigatok_jax.metrics.alarm import UsageAlarm  # noqa: E402
from gigatok_jax.metrics.progress import Progress, format_duration, tensor_progress  # noqa: E402
from gigatok_jax.metrics.writers import (  # noqa: E402
    JsonlWriter,
    MetricWriter,
    TensorBoardWriter,
    make_writer,
    read_metrics,
)

__all__ = [
    "JsonlWriter",
    "MetricWriter",
    "Progress",
    "TensorBoardWriter",
    "UsageAlarm",
    "format_duration",
    "make_writer",
    "read_metrics",
    "tensor_progress",
]
