"""Rules about model, layout and engine: what can be built at all, whatever it is trained on."""

import math
from collections.abc import Iterator
from typing import Any

from megalite.config.loader import unknown_key_message
from megalite.config.schema import ContextMethod, ModelConfig, TrainConfig
from megalite.errors import ConfigError

# The vocabulary is padded to this multiple whatever the tensor-parallel size, so the padded shape never depends on it.
VOCAB_MULTIPLE = 128

# Keys of a DeepSpeed configuration that engine.ds_overrides may hold: None for one value, () for a section whose keys
# DeepSpeed checks itself, else the section's keys. DeepSpeed accepts unknown keys elsewhere without a word, so the list
# is closed; what MegaLite derives itself (batch sizes, optimizer, clipping) is not on it.
DS_OVERRIDES: dict[str, tuple[str, ...] | None] = {
    "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow", "immediate_grad_update"),
    "comms_logger": (),
    "communication_data_type": None,
    "data_types": ("grad_accum_dtype",),
    "dump_state": None,
    "flops_profiler": ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed",
                       "output_file"),
    "fp16": ("auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads", "hysteresis",
             "initial_scale_power", "loss_scale", "loss_scale_window", "min_loss_scale"),
    "memory_breakdown": None,
    "wall_clock_breakdown": None,
    "zero_optimization": (
        "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "contiguous_gradients",
        "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "log_trace_cache_warnings",
        "max_live_parameters", "max_reuse_distance", "memory_efficient_linear", "model_persistence_threshold",
        "module_granularity_threshold", "overlap_comm", "override_module_apply", "param_persistence_threshold",
        "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "sub_group_size",
        "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size",
        "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
    ),
}  # fmt: skip
# Section -> key of it -> the key of ours that it would contradict.
DS_DERIVED = {
    "bf16": {"enabled": "engine.precision"},
    "fp16": {"enabled": "engine.precision"},
    "zero_optimization": {
        "stage": "engine.zero_stage",
        "offload_optimizer": "engine.offload",
        "offload_param": "engine.offload",
    },
}


def validate_layout(config: TrainConfig, world_size: int) -> None:
    """Raise one `ConfigError` with a line for every rule of this room that `config` breaks."""
    if problems := list(layout_rules(config, world_size)):
        raise ConfigError("\n".join(problems))


def layout_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    """A line for every broken rule about model, layout and engine."""
    for rule in (_model_rules, _parallel_rules, _engine_rules):
        yield from rule(config, world_size)


def resolve_context_method(method: ContextMethod, model: ModelConfig, tensor: int, context: int) -> ContextMethod:
    """The method that `auto` stands for: ulysses where every rank gets key and value heads of its own, else ring."""
    if method != "auto":
        return method
    return "ulysses" if model.num_kv_heads // tensor % context == 0 else "ring"


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token embedding as stored in memory, a multiple of `VOCAB_MULTIPLE`."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _model_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    model = config.model
    for key in ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size",
                "ffn_hidden_size", "max_sequence_length", "vocab_size"):  # fmt: skip
        value = getattr(model, key)
        if value is not None and value < 1:
            yield f"model.{key}: found {value}, must be at least 1"
            return
    yield from _head_rules(model)
    if model.positions == "sinusoidal" and model.hidden_size % 2:
        yield f"model.hidden_size: found {model.hidden_size}, sinusoidal positions need an even number"
    if not 0 <= model.dropout < 1:
        yield f"model.dropout: found {model.dropout}, must be at least 0 and below 1"
    for key in ("init_std", "norm_eps", "rotary_base"):
        if not is_positive(getattr(model, key)):
            yield f"model.{key}: found {getattr(model, key)}, must be above 0"
    yield from _rotary_scaling_rules(model)
    yield from _attention_rules(model)


def _head_rules(model: ModelConfig) -> Iterator[str]:
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if model.head_size is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads: found {heads}, which does not divide model.hidden_size={model.hidden_size}; "
            f"allowed: {divisors(model.hidden_size)}, or set model.head_size"
        )
    if heads % kv_heads:
        yield (
            f"model.num_key_value_heads: found {kv_heads}, must divide model.num_attention_heads={heads}; "
            f"allowed: {divisors(heads)}"
        )
    if model.positions == "rotary" and model.head_dim % 2:
        yield f"model.head_size: found {model.head_dim}, rotary positions need an even number"


def _attention_rules(model: ModelConfig) -> Iterator[str]:
    for key in ("attention_soft_cap", "logit_soft_cap"):
        value = getattr(model, key)
        if value is not None and not is_positive(value):
            yield f"model.{key}: found {value}, must be above 0, or null for none"
    if model.sliding_window is not None and model.sliding_window < 1:
        yield f"model.sliding_window: found {model.sliding_window}, must be at least 1, or null for none"


def _rotary_scaling_rules(model: ModelConfig) -> Iterator[str]:
    scaling = model.rotary_scaling
    if scaling is None:
        return
    if model.positions != "rotary":
        yield f"model.rotary_scaling: has no effect with model.positions={model.positions}; set it to null"
    if not 1 <= scaling.factor < math.inf:
        yield f"model.rotary_scaling.factor: found {scaling.factor}, must be at least 1"
    if scaling.method == "ntk" and model.head_dim < 4:
        yield f"model.rotary_scaling.method: found ntk, which needs heads of 4 at least, not {model.head_dim}"
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        below, above = getattr(scaling, low), getattr(scaling, high)
        if not 0 < below < above < math.inf:
            yield (
                f"model.rotary_scaling.{low}: found {below}, must lie between 0 and model.rotary_scaling.{high}={above}"
            )
    if scaling.original_max_sequence_length < 1:
        yield (
            "model.rotary_scaling.original_max_sequence_length: found "
            f"{scaling.original_max_sequence_length}, must be at least 1"
        )


def _parallel_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if tensor < 1:
        yield f"parallel.tensor: found {tensor}, must be at least 1"
        return
    if world_size % tensor:
        yield (
            f"parallel.tensor: found {tensor}, must divide the number of processes, which is {world_size}; allowed: "
            f"{divisors(world_size)}; or start another number with launch.nproc_per_node (or your launcher's option)"
        )
    split = {"num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.num_key_value_heads,
             "ffn_hidden_size": model.ffn_size}  # fmt: skip
    for key, size in split.items():
        if size is not None and size % tensor:
            yield f"parallel.tensor: found {tensor}, must divide model.{key}={size}; allowed: {divisors(size)}"
    yield from _context_rules(config, world_size)
    if model.vocab_size is not None and padded_vocab_size(model.vocab_size) % tensor:
        padded = padded_vocab_size(model.vocab_size)
        yield f"parallel.tensor: found {tensor}, must divide the padded vocabulary of {padded} rows"


def _context_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    if parallel.context < 1:
        yield f"parallel.context: found {parallel.context}, must be at least 1"
        return
    if parallel.context == 1:
        return
    replicas = world_size // parallel.tensor
    if replicas % parallel.context:
        yield (
            f"parallel.context: found {parallel.context}, must divide what the tensor axis leaves of {world_size} "
            f"processes, which is {replicas}; allowed: {divisors(replicas)}; or start another number of processes"
        )
    method = resolve_context_method(parallel.context_method, model, parallel.tensor, parallel.context)
    heads = model.num_kv_heads // parallel.tensor
    if method == "ulysses" and heads % parallel.context:
        yield (
            f"parallel.context_method: found ulysses, which splits the {heads} key and value heads of a rank over "
            f"parallel.context={parallel.context}; allowed: ring, or a parallel.context of {divisors(heads)}"
        )
    if model.sliding_window is not None:
        yield (
            f"model.sliding_window: found {model.sliding_window} with parallel.context={parallel.context}, where every "
            "rank sees whole sequences; allowed: null, or parallel.context=1"
        )
    if method == "ring" and model.attention_soft_cap is not None:
        yield (
            f"model.attention_soft_cap: found {model.attention_soft_cap} with ring attention, whose kernels have none; "
            "allowed: null, or parallel.context_method=ulysses"
        )
    if method == "ring" and model.dropout > 0:
        yield (
            f"model.dropout: found {model.dropout} with ring attention, which cannot drop attention weights; allowed: "
            "0, or parallel.context_method=ulysses"
        )
    if method == "ring" and config.engine.compile:
        yield "engine.compile: true does not go with ring attention; allowed: false, or parallel.context_method=ulysses"
    runs = parallel.context * (2 if method == "ring" else 1)
    parts = runs * (parallel.tensor if parallel.sequence else 1)
    if length % parts:
        yield (
            f"data.sequence_length: found {length}, must be a multiple of {parts} = {runs} runs ({method}, "
            f"parallel.context={parallel.context}) x {parts // runs} tensor ranks; nearest: "
            f"{max(length // parts, 1) * parts} or {(length // parts + 1) * parts}"
        )


def _engine_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    engine = config.engine
    if engine.zero_stage == 0 and engine.precision in ("bf16", "fp16"):
        yield (
            f"engine.precision: found {engine.precision} with engine.zero_stage=0, where DeepSpeed's half-precision "
            "wrapper drifts and reports wrong gradient norms; allowed: engine.precision=fp32, or engine.zero_stage=1"
        )
    if not 0 <= engine.grad_clip < math.inf:
        yield f"engine.grad_clip: found {engine.grad_clip}, must be 0 (off) or more"
    if engine.compile and engine.zero_stage == 3:
        yield "engine.compile: true does not go with engine.zero_stage=3, whose hooks break the graph; allowed: 0, 1, 2"
    if engine.offload == "optimizer" and engine.zero_stage == 0:
        yield "engine.offload: optimizer needs engine.zero_stage of 1, 2 or 3, found 0"
    if engine.offload == "parameters" and engine.zero_stage != 3:
        yield f"engine.offload: parameters needs engine.zero_stage=3, found {engine.zero_stage}"
    for key, value in engine.ds_overrides.items():
        yield from _ds_override_rules(key, value)


def _ds_override_rules(key: str, value: Any) -> Iterator[str]:
    name = f"engine.ds_overrides.{key}"
    if key not in DS_OVERRIDES:
        yield f"{name}: unknown to MegaLite, or derived by it; allowed: {', '.join(DS_OVERRIDES)}"
        return
    section = DS_OVERRIDES[key]
    if section is None:
        return
    if not isinstance(value, dict):
        yield f"{name}: found {value!r}, must be a group of keys, such as {name}.KEY=VALUE"
        return
    for inner in value:
        if inner in DS_DERIVED.get(key, ()):
            yield f"{name}.{inner}: is derived from {DS_DERIVED[key][inner]}; set that"
        elif section and inner not in section:
            yield unknown_key_message(f"{name}.{inner}", inner, section)


def is_positive(number: float) -> bool:
    """Above 0, and neither inf nor nan."""
    return 0 < number < math.inf


def divisors(number: int) -> str:
    """The divisors of a small number, as words for a message."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
