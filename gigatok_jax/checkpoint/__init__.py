"""Sharded checkpoints of a run, and how a stored run is compared with the one that goes on from it."""

from gigatok_jax.checkpoint.checkpointer import Checkpointer
from gigatok_jax.checkpoint.comparison import CheckpointMismatch, config_diff

__all__ = ["CheckpointMismatch", "Checkpointer", "config_diff"]
