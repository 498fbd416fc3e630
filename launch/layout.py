"""What `launch.dry_run=true` says of a layout: ranks on their axes, and what they hold."""

from pathlib import Path

from megalite.config.schema import TrainConfig

from .lives import saved_step
from .prepare import Training

_CHECKPOINT_BYTES = 12  # a parameter: fp32 weights and two moments


def describe_layout(training: Training) -> str:
    """Lines about ranks, axes, batch and sizes. Imports torch, for the number of parameters."""
    config, world_size = training.config, training.world_size
    parallel, trainer = config.parallel, config.trainer
    data_size = world_size // (parallel.tensor * parallel.context)
    accumulation = trainer.global_batch_size // (trainer.micro_batch_size * data_size)
    tokens = trainer.global_batch_size * config.data.sequence_length
    return "\n".join(
        [
            f"run        {config.run_name} in {Path(config.run_dir).absolute()}",
            f"ranks      {world_size} = {config.launch.nodes} nodes x {training.ranks_per_node}, on {training.device}",
            f"axes       tensor {parallel.tensor} x context {parallel.context} x data {data_size}; ZeRO "
            f"{config.engine.zero_stage}, {config.engine.precision}",
            f"batch      {trainer.global_batch_size} sequences = micro batch {trainer.micro_batch_size} x data "
            f"{data_size} x accumulation {accumulation}; {tokens:,} tokens a step, {trainer.steps:,} steps",
            *_sizes(config),
        ]
    )


def _sizes(config: TrainConfig) -> list[str]:
    from megalite.models import count_parameters

    if config.model.vocab_size is None:
        return ["model      its vocabulary is that of data.train once the jobs of launch.slurm.after have ended"]
    parameters = count_parameters(config.model)
    return [
        f"model      {parameters:,} parameters, {parameters // config.parallel.tensor:,} a tensor rank at the least",
        f"checkpoint {parameters * _CHECKPOINT_BYTES / 1e9:.2f} GB{_what_stands(config)}",
    ]


def _what_stands(config: TrainConfig) -> str:
    step = saved_step(Path(config.run_dir))
    return f"; continues from step {step}" if step and config.checkpoint.resume == "auto" else ""
