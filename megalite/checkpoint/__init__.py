"""Logical checkpoints: full-shape tensors of any layout, saved from an engine and loaded into another."""

from megalite.checkpoint.counters import Counters
from megalite.checkpoint.load import agree_on_checkpoint, load_checkpoint, load_model
from megalite.checkpoint.save import save_checkpoint

__all__ = ["Counters", "agree_on_checkpoint", "load_checkpoint", "load_model", "save_checkpoint"]
