"""The flags of programs that run as several processes, and how such a program joins the others."""

from absl import flags

from gigatok_jax import distributed


def define() -> None:
    """Called by a program's own `define_flags`."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0 for several processes, or 'auto' on a cluster.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is.")


def join() -> None:
    """Joins this process to the others, before any JAX computation.

    Raises:
      ValueError, RuntimeError: as `distributed.initialize`.
    """
    options = flags.FLAGS
    distributed.initialize(options.coordinator, options.num_processes, options.process_id)
