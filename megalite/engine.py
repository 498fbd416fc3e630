"""The glue to DeepSpeed: one `train_step(micro_batches)` over ZeRO 0-3, precision, accumulation and clipping.

Only this room imports DeepSpeed; `checkpoint/` reaches it through the engine.
"""

import contextlib
import gc
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalite.comm import all_reduce
from megalite.config.schema import TrainConfig
from megalite.errors import ConfigError
from megalite.layers.cross_entropy import LossTerms, Target
from megalite.mesh import Mesh
from megalite.models import (
    Decoder,
    allocate,
    build_model,
    init_parameter,
    iter_parameter_slots,
    named_logical_parameters,
)
from megalite.objectives import Batch, documents_of
from megalite.optim import build_optimizer, clip_grad_norm
from megalite.rng import micro_batch_key, seed_attention_stream

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors stay on the device: reading them is the caller's synchronisation."""

    loss: torch.Tensor  # mean over all predicted tokens of the global batch, nats
    grad_norm: torch.Tensor | float  # global 2-norm before clipping
    applied: bool  # False: the gradients held inf or nan and the weights were left alone
    requests: Callable[[], list[int]]  # see `Engine.train_step`; the same on every rank


class Engine:
    """A model, its optimizer and DeepSpeed's engine around both."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        """Build the model on the mesh; its weights are zeros until `init_weights` or a checkpoint fills them in.

        `engine.precision` is resolved (see `config.validate.resolve_auto`). Raises `ConfigError` for a precision that
        the device cannot do, and for overrides that DeepSpeed refuses.
        """
        self.config = config
        self.mesh = mesh
        self.precision = config.engine.precision
        assert self.precision != "auto", "a configuration is resolved (config.validate.resolve_auto) before it is used"
        self.ds_config = build_ds_config(config, mesh, self.precision)
        self.deepspeed = _import_deepspeed(mesh.device.type)
        # zero.Init reads it, whoever started the process.
        os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))
        self.deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        _check_precision(self.deepspeed, self.precision)
        self.model: Decoder = build_model(config.model, mesh, recompute=config.engine.recompute)
        with _refused_overrides(config.engine.ds_overrides):
            self.ds, self.optimizer = self._wrap_model()
        self._dropout = config.model.dropout > 0
        self._loss_terms = LossTerms(config.objective.label_smoothing, config.objective.z_loss)

    def _wrap_model(self) -> tuple[Any, Any]:
        """Give the model storage and put DeepSpeed's engine and optimizer around it."""
        config, mesh, model = self.config, self.mesh, self.model
        self.deepspeed.DeepSpeedConfig(self.ds_config, mesh.mpu)  # refuses what it can before memory is taken
        if self.zero_stage == 3:
            _allocate_sharded(self.deepspeed, model, mesh, self.ds_config, DTYPES[self.precision])
        else:
            allocate(model, mesh, DTYPES[self.precision])
        if config.engine.compile:
            model.compile_blocks()
        optimizer = build_optimizer(config.optimizer, model.parameters())
        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables of memory use
            ds, ds_optimizer, _, _ = self.deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.ds_config, mpu=mesh.mpu, dist_init_required=False
            )
        return ds, ds_optimizer

    @property
    def zero_stage(self) -> int:
        """How far optimizer states (1), gradients (2) and parameters (3) are sharded over the data axis."""
        return self.config.engine.zero_stage

    @property
    def seeks_loss_scale(self) -> bool:
        """Whether an overflow may be one of fp16's dynamic loss scale, which begins too high."""
        return self.precision == "fp16" and self.optimizer.loss_scaler.cur_scale > 1

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Logical names and parameters, in an order that is the same on every rank."""
        return list(named_logical_parameters(self.model))

    def init_weights(self) -> None:
        """Initial weights from `config.seed`, one parameter at a time: the same for every layout and precision.

        In half precision the fp32 master weights get the unrounded values. Rounded ones would sit in the middle of
        their half-precision neighbourhood, and the small updates of the first steps would all round back.
        """
        for name, parameter in self.parameters():
            self.set_weight(parameter, init_parameter(name, parameter, self.config.seed, self.mesh))

    def set_weight(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite a parameter and its fp32 master with this tensor rank's `value`, given whole over the data axis."""
        value = value.to(self.mesh.device, torch.float32)
        if self.zero_stage > 0:
            self.deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        if self.zero_stage < 3:
            parameter.data.copy_(value)
            return
        # ZeRO 3: this rank's piece of the flat tensor; small parameters are kept whole on every rank besides.
        piece, flat = parameter.ds_tensor, value.flatten()  # type: ignore[attr-defined]
        own = flat[self.mesh.replica.rank * piece.numel() :][: piece.numel()]
        piece[: len(own)].copy_(own)
        if parameter.data.shape == value.shape:
            parameter.data.copy_(value)

    def train_step(
        self, micro_batches: Sequence[Batch], step: int, learning_rate: float, requests: Sequence[int] = ()
    ) -> StepResult:
        """Forward, backward and update over this data rank's micro batches of the global batch, of whole sequences.

        The loss is normalised by the number of predicted tokens of the whole global batch, counted before the first
        backward; DeepSpeed averages gradients over data and context, which is undone beforehand. `step` keys the
        dropout. `requests` are summed over all ranks with that count, for what ranks must agree on.
        """
        self.ds.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        micro_batches = [self._own_part(batch.to(self.mesh.device)) for batch in micro_batches]
        num_tokens = torch.stack([batch.mask_BS.sum() for batch in micro_batches]).sum()
        asked = [torch.full((), request, device=self.mesh.device) for request in requests]
        # Over tensor ranks too, which count the same tokens: each request may be of any one rank.
        num_tokens, *agreed = all_reduce(torch.stack([num_tokens, *asked]), self.mesh.world).unbind()
        num_tokens = (num_tokens // self.mesh.tensor.size).clamp(min=1)  # none where all documents are skipped
        requested = _read_later(torch.stack(agreed)) if agreed else list
        loss = torch.zeros((), device=self.mesh.device)
        grad_norm: torch.Tensor | float | None = None
        for i, batch in enumerate(micro_batches):
            part = self._summed_loss(batch, self._dropout_key(step, i)) / num_tokens
            self.ds.backward(part * self.mesh.replica.size, scale_wrt_gas=False)
            loss += part.detach()
            if self.zero_stage == 0 and i == len(micro_batches) - 1:
                grad_norm = clip_grad_norm(self.model.parameters(), self.config.engine.grad_clip, self.mesh.tensor)
                if not torch.isfinite(grad_norm):
                    return self._skip_unsharded(loss, grad_norm, requested)
            self.ds.step()
        if grad_norm is None:
            grad_norm = self.ds.get_global_grad_norm()
        return StepResult(all_reduce(loss, self.mesh.replica), grad_norm, self.ds.was_step_applied(), requested)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods [B, S] in nats of the positions that this rank holds; 0 outside the mask.

        Call on every rank.
        """
        self.ds.eval()
        batch = self._own_part(batch.to(self.mesh.device))
        return torch.where(batch.mask_BS, self._forward(batch, Target(batch.labels_BS)), 0.0)

    def _own_part(self, batch: Batch) -> Batch:
        if self.mesh.context.size == 1:
            return batch
        held = batch.tokens_BS.shape[1] // self.mesh.context.size
        return batch.part(self.model.positions(held, self.mesh.device))

    def _summed_loss(self, batch: Batch, dropout_key: torch.Tensor | None) -> torch.Tensor:
        # The weights are ones: divided by the number of tokens already here, fp16's gradients would vanish.
        target = Target(batch.labels_BS, batch.mask_BS.float(), self._loss_terms)
        return self._forward(batch, target, dropout_key)

    def _forward(self, batch: Batch, target: Target, dropout_key: torch.Tensor | None = None) -> torch.Tensor:
        documents = documents_of(batch.documents_BS, self.config.data)
        return self.ds(batch.tokens_BS, target, dropout_key, documents=documents)

    def _dropout_key(self, step: int, micro_batch: int) -> torch.Tensor | None:
        if not self._dropout:
            return None
        seed, mesh = self.config.seed, self.mesh
        seed_attention_stream(seed, step, micro_batch, mesh.replica.rank, mesh.tensor.rank)
        return micro_batch_key(seed, step, micro_batch, mesh.replica.rank, mesh.device)

    def _skip_unsharded(
        self, loss: torch.Tensor, grad_norm: torch.Tensor, requested: Callable[[], list[int]]
    ) -> StepResult:
        """Without ZeRO, DeepSpeed does not look for inf and nan: drop the gradients here."""
        self.ds.zero_grad()
        self.ds.micro_steps += 1  # what step() would have counted, so that the next boundary falls right
        return StepResult(all_reduce(loss, self.mesh.replica), grad_norm, False, requested)


def _read_later(values: torch.Tensor) -> Callable[[], list[int]]:
    """The values on the host: the copy is queued now, and whoever asks waits for what was queued before it alone."""
    if values.device.type == "cpu":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read


def _check_precision(deepspeed: Any, precision: str) -> None:
    """Raise `ConfigError` where DeepSpeed would refuse the precision on this device."""
    accelerator = deepspeed.accelerator.get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[precision]:
        allowed = ", ".join(name for name, works in supported.items() if works)
        raise ConfigError(f"engine.precision: found {precision}, which this device cannot do; allowed: {allowed}")


@contextlib.contextmanager
def _refused_overrides(overrides: dict[str, Any]) -> Iterator[None]:
    """Turn what DeepSpeed raises over `engine.ds_overrides` into a `ConfigError`; without any it is a bug of ours.

    DeepSpeed checks some of its settings only where it comes to use them, with whatever exception is at hand.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, LookupError, AttributeError, NotImplementedError) as error:
        if not overrides:
            raise
        raise ConfigError(
            f"engine.ds_overrides: DeepSpeed refuses the settings: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error


def build_ds_config(config: TrainConfig, mesh: Mesh, precision: str) -> dict[str, Any]:
    """The DeepSpeed configuration, derived whole from ours; it is saved as run_dir/ds_config.json."""
    engine, trainer = config.engine, config.trainer
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        # It would replace torch.nn.functional.linear for the whole process.
        zero["memory_efficient_linear"] = False
    offload = {"device": "cpu", "pin_memory": mesh.device.type != "cpu"}
    if engine.offload != "none":
        zero["offload_optimizer"] = offload
    if engine.offload == "parameters":
        zero["offload_param"] = offload
    ds_config: dict[str, Any] = {
        # To DeepSpeed, ranks that share sequences are replicas with sequences of their own.
        "train_batch_size": trainer.global_batch_size * mesh.context.size,
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "zero_optimization": zero,
        # Without ZeRO the norm and the clipping are ours: DeepSpeed reports none.
        "gradient_clipping": engine.grad_clip if engine.zero_stage > 0 else 0.0,
        # torch's AdamW serves on the CPU too; DeepSpeed's own would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }
    if precision != "fp32":
        # The default accumulates micro batches in half precision.
        ds_config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(ds_config, engine.ds_overrides)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def preload() -> None:
    """Do the slow imports now, in a process that is about to fork ranks on a CPU: seven seconds of each rank's start.

    Not on a machine with GPUs: a process that has looked at one cannot hand it on to its forks.
    """
    _import_deepspeed("cpu")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  its @torch.compile brings inductor: 2 s of a rank
    import torch._dynamo  # noqa: F401

    # A million objects that live as long as the process: the collector need not walk over them in every rank, which
    # would also copy their pages. Collected first, or garbage would stay for good.
    gc.collect()
    gc.freeze()


def _import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, quiet, and kept from looking for what is not used."""
    # Told the kind of device, it does not warn that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed
    import deepspeed.ops

    # No compiled operation is used. Asked which of them would build here, DeepSpeed runs the compiler on every start,
    # and a killed build of its `shm_comm` leaves a lock for which every later start waits for ever.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    # It calls collectives by the names that torch 2.13 is renaming; nothing that a user could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def _allocate_sharded(
    deepspeed: Any, model: Decoder, mesh: Mesh, ds_config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Give every parameter storage and shard it over data and context at once, one after the other.

    Memory stays below this rank's shard and the largest tensor.
    """
    for _, module, attribute in iter_parameter_slots(model):
        meta = getattr(module, attribute)
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(torch.zeros(meta.shape, dtype=dtype))
        holder.weight.__dict__.update(meta.__dict__)
        deepspeed.zero.Init(
            module=holder,
            data_parallel_group=mesh.replica.group,
            config_dict_or_path=ds_config,
            dtype=dtype,
            mpu=mesh.mpu,
        )
        setattr(module, attribute, holder.weight)
