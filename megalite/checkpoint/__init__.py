"""Logical checkpoints: full-shape tensors of any layout, saved from an engine and loaded into another."""

from megalite.checkpoint.counters import Counters
from megalite.checkpoint.load import agree_on_checkpoint, load_checkpoint, load_model
from megalite.checkpoint.saver import Saver, checkpoint_bytes

__all__ = ["Counters", "Saver", "agree_on_checkpoint", "checkpoint_bytes", "load_checkpoint", "load_model"]
