"""Weights of Hugging Face in, tensor by tensor: memory for the largest tensor, whatever the model's size."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import megalite
from megalite.checkpoint.writing import FILE_BYTES
from megalite.checkpoint_folder import commit, create_temporary
from megalite.checkpoint_format import FileEntry, Manifest
from megalite.config.compose import config_values
from megalite.config.frozen import save_config
from megalite.config.loader import load_config
from megalite.config.schema import ModelConfig, TrainConfig
from megalite.config.validate import resolve_auto
from megalite.config.validate_layout import validate_layout
from megalite.convert.families import family_of, read_model
from megalite.convert.family import Rule
from megalite.convert.tensors import (
    CARRIED,
    CONFIG,
    DTYPES,
    GENERATION,
    INDEX,
    WEIGHTS,
    bytes_of,
    from_part,
    logical_shards,
    part_shapes,
    planned_files,
    stored_dtype,
)
from megalite.convert.tokenizer_files import import_tokenizer
from megalite.data.files import disk_errors, new_directory
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.layers.shard import Shard
from megalite.tensor_file import TensorFileWriter

_PRECISIONS = {code: name for name, (_, code, _) in DTYPES.items()}  # by the name in safetensors
_HEAD, _EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")
# Buffers that old files carry beside the weights: causal masks, rotary frequencies.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def import_model(source: Path, output: Path) -> TrainConfig:
    """Write a run directory at step 0 from a folder of Hugging Face (config.json, safetensors, tokenizer).

    Its checkpoint holds the weights alone, in fp32 or wider; a training that resumes from it begins with zero moments.
    Returns its configuration. Raises `ConfigError` for an architecture that is not ours, `CheckpointError` for files
    that are missing, damaged or of other shapes, `DataError` when `output` exists, `ResourceError` when it cannot be
    written.
    """
    hf_config = _read_json(source / CONFIG)
    model = read_model(hf_config)
    weights = _SourceWeights(source)
    precision = weights.precision()
    rules = {rule.name: rule for rule in family_of(hf_config).rules(model)}
    weights.check_names([part for rule in rules.values() for part in rule.parts], tied=model.tied_embeddings)
    config = load_config(TrainConfig, _train_values(output, model))
    validate_layout(resolve_auto(config, "cpu", 1), world_size=1)
    with disk_errors(output), new_directory(output) as temporary:
        folder = create_temporary(temporary / "checkpoints", 0)
        files = list(_write_weights(folder, rules, weights, logical_shards(model)))
        commit(folder, _manifest(config, files, precision))
        save_config(config, temporary / "config.yaml")
        import_tokenizer(source, temporary)
        for name in (CONFIG, GENERATION):
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / CARRIED / name)
    return config


class _SourceWeights:
    """The tensors of a folder of safetensors files, one by one."""

    def __init__(self, folder: Path):
        self._files: dict[Path, Any] = {}
        self._folder = folder
        if (folder / INDEX).is_file():
            self._where = _read_index(folder)
        elif (folder / WEIGHTS).is_file():
            self._where = dict.fromkeys(self._open(folder / WEIGHTS).keys(), folder / WEIGHTS)
        else:
            raise CheckpointError(
                f"{folder} holds neither {WEIGHTS} nor {INDEX}; weights in pickle files (.bin, .pt) are not read: "
                "save them with transformers' save_pretrained"
            )
        self._where = {name: path for name, path in self._where.items() if not name.endswith(_BUFFERS)}
        # The first GPT-2 files have the names of the bare model.
        bare = not any(name.startswith(("transformer.", "model.")) for name in self._where)
        self._prefix = "transformer." if bare else ""

    def precision(self) -> str:
        """What the tensors are stored in; where they differ, the one that holds all of them: fp32.

        Raises `CheckpointError` for a tensor of another type.
        """
        found = set()
        for name, path in self._where.items():
            code = self._slice(name, path).get_dtype()
            if code not in _PRECISIONS:
                raise CheckpointError(f"{path}: {name} is {code}; known: {', '.join(_PRECISIONS)}")
            found.add(_PRECISIONS[code])
        return found.pop() if len(found) == 1 else "fp32"

    def check_names(self, wanted: Sequence[str], tied: bool) -> None:
        """Raise `CheckpointError` for a tensor that is missing or has no place in the model."""
        found = {self._their_name(name) for name in wanted}
        missing, extra = sorted(found - self._where.keys()), sorted(self._where.keys() - found)
        if tied and _HEAD in extra and not missing:  # some versions save the tied head under its own name
            (embedding,) = (name for name in found if name.endswith(_EMBEDDINGS))
            if not torch.equal(self.read(_HEAD), self.read(embedding)):
                raise CheckpointError(
                    f"{self._folder}: {CONFIG} says tie_word_embeddings, but {_HEAD} is not {embedding}: set it to "
                    "false there"
                )
            extra.remove(_HEAD)
        if missing or extra:
            raise CheckpointError(
                f"{self._folder}: the weights do not match {CONFIG}: {len(missing)} missing{_first(missing)}, "
                f"{len(extra)} without a place{_first(extra)}"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from disk."""
        name = self._their_name(name)
        try:
            return self._open(self._where[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._where[name]}: {name} cannot be read: {error}") from None

    def _slice(self, name: str, path: Path) -> Any:
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None

    def _their_name(self, name: str) -> str:
        return name.removeprefix(self._prefix) if self._prefix else name

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or missing: {error}") from None
        return self._files[path]


def _read_index(folder: Path) -> dict[str, Path]:
    """Where each tensor is. Raises `CheckpointError` for an index that is damaged, or points out of the folder."""
    index = _read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{folder / INDEX} is damaged: it has no weight_map of names and files")
    if outside := [file for file in names.values() if Path(file).name != file]:
        raise CheckpointError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of the folder")
    return {name: folder / file for name, file in names.items()}


def _write_weights(
    folder: Path, rules: Mapping[str, Rule], weights: _SourceWeights, shards: Mapping[str, Shard]
) -> Iterator[FileEntry]:
    for number, group in enumerate(planned_files((rules[name] for name in shards), shards, 4, FILE_BYTES)):
        name = f"weight-{number:05d}.safetensors"
        contents = {rule.name: (stored_dtype(rule), shards[rule.name].shape) for rule in group}
        with TensorFileWriter(folder / name, contents) as file:
            for rule in group:
                wanted = dict(part_shapes(rule, shards[rule.name]))
                for part in rule.parts:
                    tensor = weights.read(part)
                    if tuple(tensor.shape) != wanted[part]:
                        raise CheckpointError(f"{part} is {tuple(tensor.shape)}, {CONFIG} says {wanted[part]}")
                    if not torch.isfinite(tensor).all():
                        raise CheckpointError(f"{part} holds infinities or NaNs: no model to train or to run")
                    file.write(bytes_of(from_part(rule, tensor)))
        tensors = {key: list(shape) for key, (_, shape) in contents.items()}
        yield FileEntry(name=name, kind="weight", num_bytes=file.num_bytes, digest=file.digest, tensors=tensors)


def _train_values(output: Path, model: ModelConfig) -> dict[str, Any]:
    groups = ("trainer", "parallel", "engine", "objective", "optimizer", "schedule", "checkpoint", "launch", "logging")
    return {
        "run_name": output.name,
        "run_dir": str(output),
        **{group: {} for group in groups},
        "model": dataclasses.asdict(model),
        "data": {"train": [], "sequence_length": min(model.max_sequence_length, 1024)},
    }


def _manifest(config: TrainConfig, files: list[FileEntry], precision: str) -> Manifest:
    return Manifest(
        step=0,
        samples_consumed=0,
        tokens_seen=0,
        skipped_steps=0,
        skipped_in_a_row=0,
        optimizer_step=0,
        loss_scaler={},
        seed=config.seed,
        config=config_values(config),
        stores=[],
        topology={"precision": precision},
        versions={"megalite": megalite.__version__, "torch": torch.__version__},
        files=files,
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is this a model's folder of Hugging Face?") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _first(names: list[str]) -> str:
    return f" (first {names[0]})" if names else ""
