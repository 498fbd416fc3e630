"""Architectures, by name, and what surrounds a model: its parameters' names and initial values, counts."""

from megalite.config.schema import ModelConfig, Recompute
from megalite.config.validate_layout import resolve_context_method
from megalite.layers.context import Context
from megalite.mesh import Mesh
from megalite.models.counts import count_parameters, flops_per_token
from megalite.models.decoder import Decoder
from megalite.models.materialize import (
    allocate,
    gather_parameter,
    init_parameter,
    iter_parameter_slots,
    materialize,
    named_logical_parameters,
)

__all__ = [
    "ARCHITECTURES",
    "Decoder",
    "allocate",
    "build_model",
    "count_parameters",
    "flops_per_token",
    "gather_parameter",
    "init_parameter",
    "iter_parameter_slots",
    "materialize",
    "named_logical_parameters",
]

ARCHITECTURES = {"decoder": Decoder}


def build_model(config: ModelConfig, mesh: Mesh, recompute: Recompute = "none") -> Decoder:
    """This rank's share of the model, on the meta device: shapes without storage (see `materialize`)."""
    context = None
    if mesh.context.size > 1:
        method = resolve_context_method(mesh.context_method, config, mesh.tensor.size, mesh.context.size)
        context = Context(mesh.context, method)
    return ARCHITECTURES[config.architecture](config, mesh.tensor, recompute, context)
