"""Every rule that the keys of a training must keep: pure functions of configuration, world size and kind of device."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megalite.config.schema import DataConfig, StoreConfig, TrainConfig
from megalite.config.validate_launch import launch_rules, slurm_path_rules
from megalite.config.validate_layout import is_positive, layout_rules
from megalite.errors import ConfigError
from megalite.redaction import has_secret

_MOST_AT_ONCE = 32  # sequences of a micro batch, where none is given


def validate_train(config: TrainConfig, world_size: int, device_type: str = "cpu") -> None:
    """Raise one `ConfigError` with a line for every rule that `config` breaks at `world_size` processes.

    `device_type` is what the ranks will run on, `cpu` or `cuda`.
    """
    config = resolve_auto(config, device_type, world_size)
    rules = (
        layout_rules, _trainer_rules, _objective_rules, _optimizer_rules, _data_rules, _run_rules, _launch_rules,
    )  # fmt: skip
    problems = [problem for rule in rules for problem in rule(config, world_size)]
    if problems:
        raise ConfigError("\n".join(problems))


def validate_untrained(config: TrainConfig, world_size: int) -> None:
    """As `validate_train`, but for the rules about data and batch sizes: of a configuration that will not train."""
    config = resolve_auto(config, "cpu", world_size)
    rules = (layout_rules, _objective_rules, _optimizer_rules, _run_rules, _launch_rules)
    if problems := [problem for rule in rules for problem in rule(config, world_size)]:
        raise ConfigError("\n".join(problems))


def resolve_auto(config: TrainConfig, device_type: str, world_size: int) -> TrainConfig:
    """What `engine.precision=auto` means, fp32 on a CPU and bf16 on anything else, and `trainer.micro_batch_size=0`.

    Done before a configuration is frozen: continued on another kind of device, the run must not change in silence.
    """
    engine, trainer = config.engine, config.trainer
    if engine.precision == "auto":
        engine = dataclasses.replace(engine, precision="fp32" if device_type == "cpu" else "bf16")
    if trainer.micro_batch_size == 0:
        replicas, rest = divmod(world_size, max(config.parallel.tensor * config.parallel.context, 1))
        share, rest = divmod(trainer.global_batch_size, replicas) if replicas and not rest else (0, 1)
        sizes = [size for size in range(1, _MOST_AT_ONCE + 1) if not rest and share % size == 0]
        trainer = dataclasses.replace(trainer, micro_batch_size=max(sizes, default=1))
    return dataclasses.replace(config, engine=engine, trainer=trainer)


def _trainer_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    trainer = config.trainer
    for key in ("steps", "global_batch_size", "micro_batch_size", "log_every", "max_skipped_steps"):
        if getattr(trainer, key) < 1:
            yield f"trainer.{key}: found {getattr(trainer, key)}, must be at least 1"
            return
    if trainer.eval_every < 0:
        yield f"trainer.eval_every: found {trainer.eval_every}, must be 0 (only at the end) or more"
    if trainer.eval_every > 0 and not config.data.validation:
        yield f"trainer.eval_every: found {trainer.eval_every}, but data.validation names no store to evaluate on"
    if trainer.stop_after is not None and not 1 <= trainer.stop_after <= trainer.steps:
        yield f"trainer.stop_after: found {trainer.stop_after}, must lie between 1 and trainer.steps={trainer.steps}"
    data_size, rest = divmod(world_size, max(config.parallel.tensor * config.parallel.context, 1))
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


def _optimizer_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    if not is_positive(optimizer.lr):
        yield f"optimizer.lr: found {optimizer.lr}, must be above 0"
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas: found {list(optimizer.betas)}, both must be at least 0 and below 1"
    if not is_positive(optimizer.eps):
        yield f"optimizer.eps: found {optimizer.eps}, must be above 0"
    if not 0 <= optimizer.weight_decay < math.inf:
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


def _objective_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    objective = config.objective
    if not 0 <= objective.label_smoothing < 1:
        yield f"objective.label_smoothing: found {objective.label_smoothing}, must be at least 0 and below 1"
    if not 0 <= objective.z_loss < math.inf:
        yield f"objective.z_loss: found {objective.z_loss}, must be 0 (off) or more"


def same_source_rules(key: str, stores: Sequence[StoreConfig]) -> Iterator[str]:
    """Figures are reported by source: two stores of the same name would hide one another."""
    sources = [store.source for store in stores]
    for source in sorted({source for source in sources if sources.count(source) > 1}):
        yield f"{key}: two stores are reported as {source!r}; give one of them another name"


def _data_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    data, model = config.data, config.model
    if not data.train:
        yield "data.train: the list is empty, name at least one token store"
    for key, stores in (("train", data.train), ("validation", data.validation)):
        for i, store in enumerate(stores):
            if not store.path:
                yield f"data.{key}[{i}].path: is empty, name a token store"
            comes_later = key == "train" and store.weight == 0 and _is_drawn_later(data, i)
            if not is_positive(store.weight) and not comes_later:
                yield f"data.{key}[{i}].weight: found {store.weight}, must be above 0"
    yield from _schedule_rules(data)
    if data.prefetch < 0:
        yield f"data.prefetch: found {data.prefetch}, must be 0 (none) or more steps"
    yield from same_source_rules("data.validation", data.validation)
    if data.sequence_length < 1:
        yield f"data.sequence_length: found {data.sequence_length}, must be at least 1"
    elif data.sequence_length > model.max_sequence_length:
        yield (
            f"data.sequence_length: found {data.sequence_length}, must be at most "
            f"model.max_sequence_length={model.max_sequence_length}; lower one or raise the other"
        )


def _is_drawn_later(data: DataConfig, source: int) -> bool:
    return any(change.weights[source : source + 1] > (0,) for change in data.schedule)


def _schedule_rules(data: DataConfig) -> Iterator[str]:
    step_before = 0
    for i, change in enumerate(data.schedule):
        key = f"data.schedule[{i}]"
        if change.step <= step_before:
            yield f"{key}.step: found {change.step}, must be above {step_before}; steps rise from 1"
        step_before = max(change.step, step_before)
        weights = list(change.weights)
        if len(weights) != len(data.train):
            yield f"{key}.weights: found {weights}, data.train has {len(data.train)} stores: give a weight for each"
        if not all(weight == 0 or is_positive(weight) for weight in weights) or not any(weights):
            yield f"{key}.weights: found {weights}, each must be 0 or more, and one of them above 0"
    if data.train and data.schedule and not any(store.weight for store in data.train):
        yield "data.train: every weight is 0, so there is nothing to begin with; one must be above 0"


def _run_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    if not re.fullmatch(r"[\w.,=+-]{1,200}", config.run_name) or config.run_name.startswith("."):
        yield f"run_name: found {config.run_name!r}, allowed: letters, digits and _ . , = + - (at most 200)"
    if not config.run_dir:
        yield "run_dir: is empty, name a directory"
    if not 0 <= config.seed < 2**63:
        yield f"seed: found {config.seed}, must be 0 or more and below 2^63"
    if config.checkpoint.keep < 1:
        yield f"checkpoint.keep: found {config.checkpoint.keep}, must be at least 1"
    for key in ("save_every", "ephemeral_every", "keep_every"):
        if (steps := getattr(config.checkpoint, key)) < 0:
            yield f"checkpoint.{key}: found {steps}, must be 0 (none) or more steps"
    if config.checkpoint.keep_best and not (config.data.validation and config.trainer.eval_every):
        yield "checkpoint.keep_best: found true, but nothing is evaluated: set data.validation and trainer.eval_every"
    if not config.checkpoint.resume:
        yield "checkpoint.resume: is empty, allowed: auto, never, or a checkpoint's path"
    for key in config.checkpoint.allow_changes:
        if not _has_key(config, key):
            yield f"checkpoint.allow_changes: there is no key {key!r}"
    for key in ("timeout", "start_timeout"):
        seconds = getattr(config.guard, key)
        if seconds is not None and not is_positive(seconds):
            yield f"guard.{key}: found {seconds}, must be above 0 seconds"
    for first, last in config.data.skip_steps:
        if not 1 <= first <= last:
            yield f"data.skip_steps: found [{first}, {last}], expected the first and the last of some steps, from 1"
    for key in _secrets_in(dataclasses.asdict(config)):
        yield f"{key}: holds a URL with a user or password, which would be written to the run directory; take it out"


def _launch_rules(config: TrainConfig, world_size: int) -> Iterator[str]:
    yield from launch_rules(config.launch)
    if config.launch.name == "slurm":
        yield from slurm_path_rules("run_dir", config.run_dir)


def _secrets_in(value: Any, key: str = "") -> Iterator[str]:
    """Keys whose text holds the user-info of a URL."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _secrets_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _secrets_in(inner, f"{key}[{number}]")
    elif isinstance(value, str) and has_secret(value):
        yield key


def _has_key(config: Any, key: str) -> bool:
    """Whether the dotted `key` is one of a configuration; below a mapping or null anything is."""
    name, _, rest = key.partition(".")
    if name not in {field.name for field in dataclasses.fields(config)}:
        return False
    value = getattr(config, name)
    return (
        not rest
        or value is None
        or isinstance(value, dict)
        or (dataclasses.is_dataclass(value) and _has_key(value, rest))
    )
