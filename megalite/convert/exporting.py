"""Weights out for transformers, tensor by tensor, from a checkpoint of any layout."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.load import TensorReader
from megalite.checkpoint_format import read_manifest
from megalite.config.loader import load_config
from megalite.config.schema import ModelConfig, TrainConfig
from megalite.convert.families import family_for, plain
from megalite.convert.family import Family
from megalite.convert.tensors import (
    CONFIG,
    DTYPES,
    GENERATION,
    INDEX,
    WEIGHTS,
    bytes_of,
    logical_shards,
    part_shapes,
    planned_files,
    to_parts,
)
from megalite.convert.tokenizer_files import carried_settings, export_tokenizer
from megalite.data.files import disk_errors, new_directory, write_synced
from megalite.layers.shard import Shard
from megalite.tensor_file import TensorFileWriter
from megalite.tokenizer import load_tokenizer

SHARD_BYTES = 5_000_000_000  # of a file


def export_model(
    checkpoint: Path, output: Path, precision: str | None, tokenizer: Path | None, carried: Path | None = None
) -> Family:
    """Write a checkpoint of any layout as a folder that transformers loads; returns the family it became.

    `precision`: fp32, bf16 or fp16; None: that of the training. `tokenizer`: the run's. `carried`: what an import kept
    of its source. Raises `ConfigError` when no model of transformers is this one, `CheckpointError` for a damaged
    checkpoint, `DataError` when `output` exists, `ResourceError` when it cannot be written.
    """
    manifest = read_manifest(checkpoint)
    model = plain(load_config(TrainConfig, manifest.config).model)
    family = family_for(model)
    precision = precision or manifest.topology["precision"]
    dtype, code, element_bytes = DTYPES[precision]
    shards, reader = logical_shards(model), TensorReader(checkpoint, manifest)
    carried = carried_settings(carried, tokenizer)
    special = _special_tokens(tokenizer, carried)
    with disk_errors(output), new_directory(output) as temporary:
        names: dict[str, str] = {}
        files = list(planned_files(family.rules(model), shards, element_bytes, SHARD_BYTES))
        for number, rules in enumerate(files, start=1):
            name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            contents = {part: (code, shape) for rule in rules for part, shape in part_shapes(rule, shards[rule.name])}
            with TensorFileWriter(temporary / name, contents) as file:
                for rule in rules:
                    tensor = reader.read("weight", rule.name, shards[rule.name].shape)
                    for part in to_parts(rule, tensor, shards[rule.name]):
                        file.write(bytes_of(part.to(dtype)))
            names |= dict.fromkeys(contents, name)
        if len(files) > 1:
            index = {"metadata": {"total_size": _total_elements(shards) * element_bytes}, "weight_map": names}
            write_synced(temporary / INDEX, json.dumps(index, indent=2) + "\n")
        write_synced(temporary / CONFIG, _config_text(family, model, precision, special))
        if carried and (carried / GENERATION).is_file():
            shutil.copyfile(carried / GENERATION, temporary / GENERATION)
        else:
            write_synced(temporary / GENERATION, json.dumps(special, indent=2) + "\n")
        if tokenizer:
            export_tokenizer(tokenizer, temporary, carried)
    return family


def _total_elements(shards: Mapping[str, Shard]) -> int:
    return sum(torch.Size(shard.shape).numel() for shard in shards.values())


def _config_text(family: Family, model: ModelConfig, precision: str, special: Mapping[str, Any]) -> str:
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(model),
        "dtype": names[precision],
        "torch_dtype": names[precision],
        **special,
    }
    return json.dumps(values, indent=2) + "\n"


def _special_tokens(tokenizer: Path | None, carried: Path | None) -> dict[str, Any]:
    """Ids of special tokens for config.json: those of the source, or the token that begins and ends our documents."""
    if carried and (carried / CONFIG).is_file():
        source = json.loads((carried / CONFIG).read_text(encoding="utf-8"))
        return {key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in source}
    end = load_tokenizer(tokenizer).end_of_document if tokenizer else None
    return {"bos_token_id": end, "eos_token_id": end}
