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
from megalite.convert.families import family_for
from megalite.convert.family import Family
from megalite.convert.tensors import (
    CONFIG,
    DTYPES,
    INDEX,
    TOKENIZER_FILES,
    WEIGHTS,
    bytes_of,
    logical_shards,
    part_shapes,
    planned_files,
    to_parts,
)
from megalite.data.files import new_directory, write_synced
from megalite.layers.shard import Shard
from megalite.tensor_file import TensorFileWriter
from megalite.tokenizer import Tokenizer, load_tokenizer
from megalite.tokenizer.base import GPT2_FILES, HF_JSON, SP_MODEL

SHARD_BYTES = 5_000_000_000  # of a file


def export_model(checkpoint: Path, output: Path, precision: str | None, tokenizer: Path | None) -> Family:
    """Write a checkpoint of any layout as a folder that transformers loads; returns the family it became.

    `precision`: fp32, bf16 or fp16; None: that of the training. `tokenizer`: the run's. Raises `ConfigError` when no
    model of transformers is this one, `CheckpointError` for a damaged checkpoint, `DataError` when `output` exists.
    """
    manifest = read_manifest(checkpoint)
    model = load_config(TrainConfig, manifest.config).model
    family = family_for(model)
    precision = precision or manifest.topology["precision"]
    dtype, code, element_bytes = DTYPES[precision]
    shards, reader = logical_shards(model), TensorReader(checkpoint, manifest)
    end = load_tokenizer(tokenizer).end_of_document if tokenizer else None
    with new_directory(output) as temporary:
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
        write_synced(temporary / CONFIG, _config_text(family, model, precision, end))
        write_synced(temporary / "generation_config.json", json.dumps({"eos_token_id": end}, indent=2) + "\n")
        if tokenizer:
            export_tokenizer(tokenizer, temporary)
    return family


def _total_elements(shards: Mapping[str, Shard]) -> int:
    return sum(torch.Size(shard.shape).numel() for shard in shards.values())


def _config_text(family: Family, model: ModelConfig, precision: str, end: int | None) -> str:
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(model),
        "dtype": names[precision],
        "torch_dtype": names[precision],
        "bos_token_id": end,
        "eos_token_id": end,
    }
    return json.dumps(values, indent=2) + "\n"


def export_tokenizer(folder: Path, output: Path) -> None:
    """The run's tokenizer under the names that transformers reads."""
    tokenizer = load_tokenizer(folder)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and name != "tokenizer_config.json":
            shutil.copy(folder / name, output / name)
    if (output / SP_MODEL).is_file() and (text := _fast_tokenizer(tokenizer)):
        write_synced(output / HF_JSON, text + "\n")
    classes = {HF_JSON: "PreTrainedTokenizerFast", GPT2_FILES[1]: "GPT2Tokenizer", SP_MODEL: "LlamaTokenizer"}
    end = tokenizer.end_of_document_text
    values: dict[str, Any] = {"tokenizer_class": next(classes[name] for name in classes if (output / name).is_file())}
    values |= {"eos_token": end, "bos_token": end, "add_bos_token": False, "add_eos_token": False, "legacy": False}
    write_synced(output / "tokenizer_config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _fast_tokenizer(tokenizer: Tokenizer) -> str | None:
    """The text of a tokenizer.json that gives the ids of a SentencePiece model; None where no such file is known.

    From a bare tokenizer.model transformers builds a `LlamaTokenizer`, which puts a space before every text: for a
    model trained without that, other ids (seen with transformers 5.23). Tried before it is given out.
    """
    from tokenizers import Tokenizer as LibraryTokenizer

    if (content := tokenizer.library_json()) is None:
        return None
    text = json.dumps(content, ensure_ascii=False)
    fast = LibraryTokenizer.from_str(text)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    pieces = [piece for piece in pieces if "\ufffd" not in piece]  # half a character: not to be had as a text
    probes = [*pieces, "".join(pieces), " ".join(pieces), "\n".join(reversed(pieces)), "\U000f1234  \t\r\n\x00"]
    found = [encoding.ids for encoding in fast.encode_batch(probes, add_special_tokens=False)]
    return text if found == tokenizer.encode_batch(probes) else None
