"""Every rule that ties one key to another, as pure functions of the configuration and the world size."""

import math
import re
from collections.abc import Iterator

from megalite.config.schema import DataBuildConfig, GenerateConfig, ModelConfig, TokenizerTrainConfig, TrainConfig
from megalite.errors import ConfigError

# The vocabulary is padded to this multiple whatever the tensor-parallel size, so the padded shape never depends on it.
VOCAB_MULTIPLE = 128

# Keys of a DeepSpeed configuration that engine.ds_overrides may hold. DeepSpeed accepts unknown top-level keys without
# a word, so the list is closed; what MegaLite derives itself (batch sizes, optimizer, clipping) is not on it.
DS_OVERRIDE_KEYS = (
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "fp16",
    "memory_breakdown",
    "wall_clock_breakdown",
    "zero_optimization",
)
DS_OVERRIDE_REFUSED = {"fp16": ("enabled",), "bf16": ("enabled",), "zero_optimization": ("stage",)}


def validate_train(config: TrainConfig, world_size: int) -> None:
    """Raise one `ConfigError` with a line for every rule that `config` breaks at `world_size` processes."""
    rules = (_model_rules, _trainer_rules, _parallel_rules, _engine_rules, _optimizer_rules, _data_rules, _run_rules)
    problems = [problem for rule in rules for problem in rule(config, world_size)]
    if problems:
        raise ConfigError("\n".join(problems))


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token embedding as stored in memory, a multiple of `VOCAB_MULTIPLE`."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _model_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    model = config.model
    for key in ("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "ffn_size",
                "max_sequence_length"):  # fmt: skip
        if getattr(model, key) < 1:
            yield f"model.{key}: found {getattr(model, key)}, must be at least 1"
            return
    yield from _head_rules(model)
    if model.positions == "sinusoidal" and model.hidden_size % 2:
        yield f"model.hidden_size: found {model.hidden_size}, sinusoidal positions need an even number"
    if not 0 <= model.dropout < 1:
        yield f"model.dropout: found {model.dropout}, must be at least 0 and below 1"
    if model.vocab_size is not None and model.vocab_size < 1:
        yield f"model.vocab_size: found {model.vocab_size}, must be at least 1"
    if model.init_std <= 0 or model.norm_eps <= 0:
        yield f"model.init_std and model.norm_eps must be above 0, found {model.init_std} and {model.norm_eps}"
    if model.positions != "rotary" and model.rotary_scaling is not None:
        yield f"model.rotary_scaling: has no effect with model.positions={model.positions}; set it to null"


def _head_rules(model: ModelConfig) -> Iterator[str]:
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if model.head_size is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads: found {heads}, which does not divide model.hidden_size={model.hidden_size}; "
            f"allowed: {_divisors(model.hidden_size)}, or set model.head_size"
        )
    if heads % kv_heads:
        yield (
            f"model.num_key_value_heads: found {kv_heads}, must divide model.num_attention_heads={heads}; "
            f"allowed: {_divisors(heads)}"
        )
    if model.positions == "rotary" and model.head_dim % 2:
        yield f"model.head_size: found {model.head_dim}, rotary positions need an even number"


def _trainer_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    trainer = config.trainer
    for key in ("steps", "global_batch_size", "micro_batch_size", "log_every", "max_skipped_steps"):
        if getattr(trainer, key) < 1:
            yield f"trainer.{key}: found {getattr(trainer, key)}, must be at least 1"
            return
    if trainer.eval_every < 0:
        yield f"trainer.eval_every: found {trainer.eval_every}, must be 0 (only at the end) or more"
    if trainer.stop_after is not None and not 1 <= trainer.stop_after <= trainer.steps:
        yield f"trainer.stop_after: found {trainer.stop_after}, must lie between 1 and trainer.steps={trainer.steps}"
    data_size, rest = divmod(world_size, max(config.parallel.tensor, 1))
    if rest or data_size < 1:
        return  # said by _parallel_rules
    at_once = trainer.micro_batch_size * data_size
    if trainer.global_batch_size % at_once:
        lower = trainer.global_batch_size // at_once * at_once
        allowed = f"{lower} or {lower + at_once}" if lower else f"{at_once}"
        yield (
            f"trainer.global_batch_size: found {trainer.global_batch_size}, must be a multiple of "
            f"trainer.micro_batch_size x data-parallel size = {trainer.micro_batch_size} x {data_size} = {at_once}; "
            f"nearest: {allowed}"
        )


def _parallel_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if tensor < 1:
        yield f"parallel.tensor: found {tensor}, must be at least 1"
        return
    if world_size % tensor:
        yield (
            f"parallel.tensor: found {tensor}, must divide the number of processes, which is {world_size}; allowed: "
            f"{_divisors(world_size)}; or start another number with launch.nproc_per_node (or your launcher's option)"
        )
    split = {"num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.num_kv_heads,
             "ffn_hidden_size": model.ffn_size}  # fmt: skip
    for key, size in split.items():
        if size % tensor:
            yield (f"parallel.tensor: found {tensor}, must divide model.{key}={size}; allowed: {_divisors(size)}")
    if model.vocab_size is not None and padded_vocab_size(model.vocab_size) % tensor:
        padded = padded_vocab_size(model.vocab_size)
        yield f"parallel.tensor: found {tensor}, must divide the padded vocabulary of {padded} rows"


def _engine_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    engine = config.engine
    if engine.zero_stage == 0 and engine.precision in ("bf16", "fp16"):
        yield (
            f"engine.precision: found {engine.precision} with engine.zero_stage=0, where DeepSpeed's half-precision "
            "wrapper drifts and reports wrong gradient norms; allowed: engine.precision=fp32, or engine.zero_stage=1"
        )
    if engine.grad_clip < 0:
        yield f"engine.grad_clip: found {engine.grad_clip}, must be 0 (off) or more"
    if engine.compile and engine.zero_stage == 3:
        yield "engine.compile: true does not go with engine.zero_stage=3, whose hooks break the graph; allowed: 0, 1, 2"
    if engine.offload == "optimizer" and engine.zero_stage == 0:
        yield "engine.offload: optimizer needs engine.zero_stage of 1, 2 or 3, found 0"
    if engine.offload == "parameters" and engine.zero_stage != 3:
        yield f"engine.offload: parameters needs engine.zero_stage=3, found {engine.zero_stage}"
    for key, value in engine.ds_overrides.items():
        if key not in DS_OVERRIDE_KEYS:
            yield f"engine.ds_overrides: unknown or derived key {key}; allowed: {', '.join(DS_OVERRIDE_KEYS)}"
        for inner in DS_OVERRIDE_REFUSED.get(key, ()):
            if isinstance(value, dict) and inner in value:
                yield f"engine.ds_overrides.{key}.{inner}: is derived from engine.precision and engine.zero_stage"


def _optimizer_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    if not (optimizer.lr > 0 and math.isfinite(optimizer.lr)):
        yield f"optimizer.lr: found {optimizer.lr}, must be above 0"
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas: found {list(optimizer.betas)}, both must be at least 0 and below 1"
    if not optimizer.eps > 0:
        yield f"optimizer.eps: found {optimizer.eps}, must be above 0"
    if not optimizer.weight_decay >= 0:
        yield f"optimizer.weight_decay: found {optimizer.weight_decay}, must be 0 or more"
    if not 0 <= schedule.warmup_steps <= config.trainer.steps:
        yield (
            f"schedule.warmup_steps: found {schedule.warmup_steps}, must lie between 0 and "
            f"trainer.steps={config.trainer.steps}"
        )
    if not 0 <= schedule.min_lr_ratio <= 1:
        yield f"schedule.min_lr_ratio: found {schedule.min_lr_ratio}, must lie between 0 and 1"
    if schedule.name == "inverse_sqrt" and schedule.warmup_steps < 1:
        yield "schedule.warmup_steps: found 0, inverse_sqrt decays from the end of its warm-up and needs at least 1"


def _data_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    data, model = config.data, config.model
    if not data.train:
        yield "data.train: the list is empty, name at least one token store"
    for i, store in enumerate(data.train):
        if not (store.weight > 0 and math.isfinite(store.weight)):
            yield f"data.train[{i}].weight: found {store.weight}, must be above 0"
    sources = [store.source for store in data.validation]
    for source in sorted({source for source in sources if sources.count(source) > 1}):
        yield f"data.validation: two stores are reported as {source!r}; give one of them another name"
    if data.sequence_length < 1:
        yield f"data.sequence_length: found {data.sequence_length}, must be at least 1"
    elif data.sequence_length > model.max_sequence_length:
        yield (
            f"data.sequence_length: found {data.sequence_length}, must be at most "
            f"model.max_sequence_length={model.max_sequence_length}; lower one or raise the other"
        )


def _run_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    if not re.fullmatch(r"[\w.,=+-]{1,200}", config.run_name) or config.run_name.startswith("."):
        yield f"run_name: found {config.run_name!r}, allowed: letters, digits and _ . , = + - (at most 200)"
    if config.seed < 0:
        yield f"seed: found {config.seed}, must be 0 or more"
    if config.checkpoint.keep < 1:
        yield f"checkpoint.keep: found {config.checkpoint.keep}, must be at least 1"
    if config.checkpoint.save_every < 0:
        yield f"checkpoint.save_every: found {config.checkpoint.save_every}, must be 0 (only at the end) or more"
    nproc = config.launch.nproc_per_node
    if nproc is not None and nproc < 1:
        yield f"launch.nproc_per_node: found {nproc}, must be at least 1"


def validate_tokenizer_train(config: TokenizerTrainConfig) -> None:
    """Raise `ConfigError` for settings of `megalite tokenizer train` that cannot work."""
    tokenizer = config.tokenizer
    if not config.input:
        raise ConfigError("input: the list is empty, name at least one file, folder or glob")
    if not 0 < tokenizer.character_coverage <= 1:
        raise ConfigError(f"tokenizer.character_coverage: found {tokenizer.character_coverage}, must be in (0, 1]")
    if not 0 <= tokenizer.language_balance <= 1:
        raise ConfigError(f"tokenizer.language_balance: found {tokenizer.language_balance}, must be in [0, 1]")
    for key in ("vocab_size", "sample_bytes", "num_threads"):
        if getattr(tokenizer, key) < 1:
            raise ConfigError(f"tokenizer.{key}: found {getattr(tokenizer, key)}, must be at least 1")


def validate_data_build(config: DataBuildConfig) -> None:
    """Raise `ConfigError` for settings of `megalite data build` that cannot work."""
    if not config.input:
        raise ConfigError("input: the list is empty, name at least one file, folder or glob")
    if not 0 <= config.validation_fraction < 1:
        raise ConfigError(f"validation_fraction: found {config.validation_fraction}, must be at least 0 and below 1")
    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"workers: found {config.workers}, must be at least 1")
    if config.shard_tokens < 1:
        raise ConfigError(f"shard_tokens: found {config.shard_tokens}, must be at least 1")


def validate_generate(config: GenerateConfig) -> None:
    """Raise `ConfigError` for settings of `megalite generate` that cannot work."""
    if config.temperature < 0:
        raise ConfigError(f"temperature: found {config.temperature}, must be 0 (the likeliest token) or more")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p: found {config.top_p}, must be above 0 and at most 1")
    for key in ("max_new_tokens", "num_samples", "top_k"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}: found {value}, must be at least 1")


def _divisors(number: int) -> str:
    """The divisors of a small number, as words for a message."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
