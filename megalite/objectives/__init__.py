"""Objectives: how a batch is made from samples, and what counts in the loss."""

from megalite.config.schema import DataConfig, ObjectiveConfig
from megalite.layers.documents import Documents
from megalite.objectives.base import Batch
from megalite.objectives.causal_lm import CausalLM

OBJECTIVES = {"causal_lm": CausalLM}

__all__ = ["OBJECTIVES", "Batch", "CausalLM", "build_objective", "documents_of"]


def build_objective(config: ObjectiveConfig, data: DataConfig, end_of_document: int) -> CausalLM:
    """The objective named in the configuration, for data whose documents end with the token `end_of_document`."""
    asked = data.document_attention or data.document_positions
    return OBJECTIVES[config.name](data.sequence_length, end_of_document if asked else None)


def documents_of(batch: Batch, data: DataConfig) -> Documents | None:
    """What the model is told about the documents of a batch, if anything."""
    if batch.documents_BS is None:
        return None
    return Documents(batch.documents_BS, data.document_attention, data.document_positions)
