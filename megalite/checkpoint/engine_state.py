"""Reading and writing the fp32 weights and Adam moments inside DeepSpeed's ZeRO engines, one parameter at a time.

Unless it says otherwise a function is collective over the data axis. Tensors are whole over it, and this rank's shard
of the tensor axis.
"""

from typing import Any

import torch

from megalite.engine import Engine
from megalite.layers.shard import shard_of

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def get_tensor(engine: Engine, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """The fp32 weight (`weight`) or a moment (`exp_avg`, `exp_avg_sq`) of `parameter`."""
    if engine.zero_stage == 0:
        return parameter.detach() if kind == "weight" else engine.optimizer.state[parameter][kind]
    utils = engine.deepspeed.utils
    if kind == "weight":
        value = utils.safe_get_full_fp32_param(parameter)
    else:
        value = utils.safe_get_full_optimizer_state(parameter, kind)
    assert value is not None, f"DeepSpeed holds no {kind} for a parameter of shape {tuple(parameter.shape)}"
    return value


def get_fragment(engine: Engine, parameter: torch.nn.Parameter, kind: str) -> tuple[int, torch.Tensor]:
    """What this rank is to save of `get_tensor`'s: where in that, flattened, it begins, and itself, flat, uncopied.

    The fragments of all data ranks are the whole: those by which ZeRO shards, and without it a share as large for each.
    What every tensor rank holds the first one saves. Not collective.
    """
    replica = engine.mesh.replica
    if shard_of(parameter).dim is None and engine.mesh.tensor.rank > 0:
        return 0, torch.empty(0)
    if engine.zero_stage == 0:
        whole = get_tensor(engine, parameter, kind).detach().reshape(-1)
        start, end = (whole.numel() * rank // replica.size for rank in (replica.rank, replica.rank + 1))
        return start, whole[start:end]
    state = None if kind == "weight" else kind
    if engine.zero_stage == 3:
        # As `safe_get_local_fp32_param`, which takes what is offloaded to the device first. The last one is padded.
        piece, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, True, state)
        start = replica.rank * piece.numel()
        return start, piece.detach()[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # this rank holds nothing of it
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(state).detach()


def set_tensor(engine: Engine, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Overwrite what `get_tensor` reads; a weight is copied into the model's own parameter too.

    Call `create_moments` first: before its first step the optimizer has none.
    """
    if kind == "weight":
        engine.set_weight(parameter, value)
    elif engine.zero_stage == 0:
        engine.optimizer.state[parameter][kind].copy_(value)
    else:
        value = value.to(engine.mesh.device, torch.float32)
        engine.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)


def create_moments(engine: Engine, optimizer_step: int) -> None:
    """Give the optimizer zero moments and its step count, as if it had stepped before."""
    inner = _inner_optimizer(engine)
    if engine.zero_stage == 3:
        flats = list(engine.optimizer.fp32_partitioned_groups_flat)
    else:
        flats = [parameter for group in inner.param_groups for parameter in group["params"]]
    for flat in flats:
        inner.state[flat] = {"step": torch.tensor(float(optimizer_step), device=flat.device)} | {
            kind: torch.zeros_like(flat) for kind in _MOMENTS
        }
    link_moments(engine)


def link_moments(engine: Engine) -> None:
    """Let DeepSpeed find the moments of every parameter; call before reading or writing them.

    ZeRO 1 and 2 link parameters to their moments once, after the first group's first step, when the moments of the
    other groups do not exist yet (DeepSpeed 0.19.8, `_optimizer_step`): so link again. A run whose steps were all
    skipped has no moments yet: they are zero.
    """
    if not _inner_optimizer(engine).state:
        create_moments(engine, optimizer_step=0)
    elif engine.zero_stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_step(engine: Engine) -> int:
    """Adam's step count."""
    counts = {int(state["step"]) for state in _inner_optimizer(engine).state.values() if "step" in state}
    assert len(counts) <= 1, f"parameters disagree on the number of optimizer steps: {counts}"
    return counts.pop() if counts else 0


def get_loss_scaler(engine: Engine) -> dict[str, float]:
    """The state of fp16's dynamic loss scale; empty in other precisions."""
    if engine.precision != "fp16":
        return {}
    return {name: getattr(engine.optimizer.loss_scaler, name) for name in _SCALER}


def set_loss_scaler(engine: Engine, values: dict[str, float]) -> None:
    """Restore what `get_loss_scaler` read; a run that turned to fp16 only now keeps its fresh scale."""
    if engine.precision == "fp16":
        for name, value in values.items():
            setattr(engine.optimizer.loss_scaler, name, value)


def _inner_optimizer(engine: Engine) -> Any:
    """torch's optimizer, under DeepSpeed's wrapper if there is one."""
    return engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer
