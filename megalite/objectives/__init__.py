"""Objectives: how a batch is made from samples, and what counts in the loss."""

from megalite.config.schema import ObjectiveConfig
from megalite.objectives.base import Batch
from megalite.objectives.causal_lm import CausalLM

OBJECTIVES = {"causal_lm": CausalLM}

__all__ = ["OBJECTIVES", "Batch", "CausalLM", "build_objective"]


def build_objective(config: ObjectiveConfig, sequence_length: int) -> CausalLM:
    """The objective named in the configuration, for sequences of `sequence_length` tokens."""
    return OBJECTIVES[config.name](sequence_length)
