"""Training in plain torch: one process, whole tensors, its own optimizer settings; what layouts are held to."""

from collections.abc import Iterable

import torch

from megalite.config.schema import TrainConfig
from megalite.mesh import single_mesh
from megalite.models import build_model, init_parameter, named_logical_parameters
from tests.models.plain import plain_losses

Curve = list[tuple[float, float]]  # loss and gradient norm of each step


def initial_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Whole fp32 tensors on the CPU by logical name, as the engine draws them."""
    mesh = single_mesh(torch.device("cpu"))
    return {
        # `gather` of the only part takes the vocabulary's padding away.
        name: parameter.shard.gather([init_parameter(name, parameter, config.seed, mesh)]).clone().requires_grad_()
        for name, parameter in named_logical_parameters(build_model(config.model, mesh))
    }


def plain_curve(
    config: TrainConfig, batches: Iterable[torch.Tensor], rates: Iterable[float], end: int | None = None
) -> Curve:
    """Train on global batches [B, S + 1], a learning rate each; `end`: documents are read apart."""
    weights = initial_weights(config)
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    vectors = [weight for weight in weights.values() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for batch, rate in zip(batches, rates, strict=True):
        loss = plain_losses(weights, config.model, batch[:, :-1], batch[:, 1:], end).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve
