"""Drivers of the commands that need torch; it is imported inside the functions, after the configuration is checked."""

import sys
from pathlib import Path

from megalite.checkpoint_folder import require_checkpoint
from megalite.config.compose import compose_config, compose_train, config_values, flatten
from megalite.config.frozen import read_config
from megalite.config.schema import EvaluateConfig, ExportConfig, GenerateConfig, ImportConfig
from megalite.config.validate_commands import validate_evaluate, validate_generate
from megalite.errors import EXIT_OK, ConfigError
from megalite.log import setup_logging


def evaluate(arguments: list[str]) -> int:
    """Print loss, perplexity and bits per byte of a checkpoint on whole documents, by source."""
    setup_logging()
    config = compose_config("eval", EvaluateConfig, arguments)
    validate_evaluate(config)
    read_config(Path(config.run_dir) / "config.yaml")  # before the seconds that importing torch takes
    from megalite.evaluate import evaluate as run

    for name, value in run(config).items():
        print(f"{name} {value:.6g}")
    return EXIT_OK


def generate(arguments: list[str]) -> int:
    """Print text that a checkpoint writes."""
    setup_logging()
    config = compose_config("generate", GenerateConfig, arguments)
    validate_generate(config)
    read_config(Path(config.run_dir) / "config.yaml")  # before the seconds that importing torch takes
    from megalite.generate import generate as run

    for number, text in enumerate(run(config)):
        if number:
            print("-" * 40)
        print(text)
        sys.stdout.flush()
    return EXIT_OK


def import_weights(arguments: list[str]) -> int:
    """Write a run directory at step 0 from weights of Hugging Face."""
    setup_logging()
    config = compose_config("import", ImportConfig, arguments)
    from megalite.convert.importing import import_model

    imported = import_model(Path(config.hf), Path(config.output))
    defaults = flatten(config_values(compose_train(["data.train=unused"]).model))  # what training would take otherwise
    keys = {key: value for key, value in flatten(config_values(imported.model)).items() if value != defaults.get(key)}
    print(f"{config.output}: a run at step 0. Its model, for training:")
    print(" ".join(f"model.{key}={'null' if value is None else value}" for key, value in keys.items()))
    return EXIT_OK


def export_weights(arguments: list[str]) -> int:
    """Write a checkpoint as a folder of Hugging Face."""
    setup_logging()
    config = compose_config("export", ExportConfig, arguments)
    if (config.run_dir is None) == (config.checkpoint is None):
        raise ConfigError("give one of run_dir=DIR (its newest checkpoint is taken) and checkpoint=PATH")
    run_dir = Path(config.run_dir) if config.run_dir else Path(str(config.checkpoint)).parent.parent
    folder = require_checkpoint(config.checkpoint, run_dir)
    from megalite.convert.exporting import export_model
    from megalite.convert.tensors import CARRIED

    tokenizer = run_dir / "tokenizer" if (run_dir / "tokenizer").is_dir() else None
    family = export_model(folder, Path(config.output), config.precision, tokenizer, run_dir / CARRIED)
    print(f"{config.output}: {family.architecture} of {folder}")
    return EXIT_OK
