"""Optimizers, learning-rate schedules, and the global gradient norm under tensor parallelism."""

import math
from collections.abc import Callable, Iterable

import torch

from megalite.comm import all_reduce
from megalite.config.schema import OptimizerConfig, ScheduleConfig
from megalite.mesh import Axis

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over two groups: matrices, which decay, and vectors (norms, biases), which do not.

    `adamw` decays the weights directly (Loshchilov & Hutter 2019), `adam` adds the decay to the gradient (L2). The
    fused kernels make one pass over memory, on CPU too. The learning rate is set before every step by the engine.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if _num_dims(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if _num_dims(p) < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name](
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )  # type: ignore[call-arg]


def _num_dims(parameter: torch.nn.Parameter) -> int:
    """Dimensions of the whole tensor; ZeRO 3 leaves an empty one-dimensional stub in the parameter's place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _constant(progress: float, step: int, warmup: int) -> float:
    return 1.0


def _linear(progress: float, step: int, warmup: int) -> float:
    return 1.0 - progress


def _cosine(progress: float, step: int, warmup: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _inverse_sqrt(progress: float, step: int, warmup: int) -> float:
    return math.sqrt(warmup / (step + 1))


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "linear": _linear,
}


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The learning rate of 0-based `step` out of `steps`: linear warm-up to `peak`, then the schedule.

    Warm-up: `peak * (step + 1) / warmup_steps`. After it, `cosine` (Loshchilov & Hutter 2017) and `linear` run from
    `peak` down to `min_lr_ratio * peak`; `inverse_sqrt` is `peak * sqrt(warmup_steps / (step + 1))`, the decay of
    Vaswani et al. 2017 ("noam") with its constant folded into `peak`; it has no floor.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    shape = SCHEDULES[config.name](min(progress, 1.0), step, warmup)
    if config.name in ("cosine", "linear"):
        shape = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape
    return peak * shape


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float, tensor: Axis) -> torch.Tensor:
    """Scale gradients so that their global 2-norm is at most `max_norm` (0: leave them); returns the norm before.

    Shards of a tensor-parallel parameter (`tensor_model_parallel`) are summed over the tensor axis, replicated ones
    count once, so the norm equals that of the unsharded model.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    split = [p.grad for p in parameters if getattr(p, "tensor_model_parallel", False)]
    replicated = [p.grad for p in parameters if not getattr(p, "tensor_model_parallel", False)]
    squared = all_reduce(_squared_norm(split, parameters[0]), tensor) + _squared_norm(replicated, parameters[0])
    norm = squared.sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
    return norm


def _squared_norm(grads: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    norms = torch._foreach_norm([grad.detach().float() for grad in grads if grad is not None]) if grads else ()
    return torch.stack(list(norms)).square().sum() if norms else torch.zeros((), device=like.device)
