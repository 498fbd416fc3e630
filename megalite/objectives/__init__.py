"""Objectives: how a batch is made from samples, and what counts in the loss."""

from torch import Tensor

from megalite.config.schema import DataConfig, ObjectiveConfig
from megalite.layers.documents import Documents
from megalite.objectives.base import Batch
from megalite.objectives.causal_lm import CausalLM

OBJECTIVES = {"causal_lm": CausalLM}

__all__ = ["OBJECTIVES", "Batch", "CausalLM", "build_objective", "documents_of"]


def build_objective(config: ObjectiveConfig, data: DataConfig, end_of_document: int) -> CausalLM:
    """The objective named in the configuration, for data whose documents end with the token `end_of_document`."""
    return OBJECTIVES[config.name](data.sequence_length, end_of_document if data.needs_documents else None)


def documents_of(ids_BS: Tensor | None, data: DataConfig) -> Documents | None:
    """What the model is told about the documents of sequences, `document_ids`, if there are any."""
    return None if ids_BS is None else Documents(ids_BS, data.document_attention, data.document_positions)
