"""Checks that need the disk but no torch: the configuration against its stores and against the run's checkpoint."""

import dataclasses
import importlib.util
from pathlib import Path

from megalite.checkpoint_folder import list_checkpoints
from megalite.checkpoint_format import read_manifest
from megalite.config.schema import DataConfig, StoreConfig, TrainConfig
from megalite.data.format import TokenStore
from megalite.data.packing import PackedRows
from megalite.data.skipping import skipped_documents
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.log import get_logger
from megalite.resuming import check_resume

log = get_logger(__name__)


def preflight(config: TrainConfig, is_alone: bool = True) -> TrainConfig:
    """Open every store, compare vocabularies and tokenizers, look at the checkpoint to resume from and at libraries.

    Returns the configuration with `model.vocab_size` filled in from the stores where it was null. `is_alone`: no other
    host takes part, which may hold a newer checkpoint; where one does, only ranks look at checkpoints, together. Raises
    `ConfigError`, `DataError` or `CheckpointError`, naming the key or the file.
    """
    _check_libraries(config)
    stores = [_open("data.train", store) for store in config.data.train]
    for store in stores:
        _check_units(store, config.data)
    skipped_documents(config.data, stores)
    digests = [store.digest for store in stores]
    validation = [_open("data.validation", store) for store in config.data.validation]
    for store in validation:
        if store.digest in digests:
            log.warning("data.validation: %s is trained on too: its figures say nothing about new text", store.path)
    _check_tokenizers(stores + validation)
    config = _with_vocab_size(config, stores + validation)
    if is_alone:
        _check_checkpoint(config)
    return config


def _check_libraries(config: TrainConfig) -> None:
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard: found true, but the library is not installed: pip install megalite[tensorboard], or "
            "set logging.tensorboard=false"
        )


def _open(key: str, store: StoreConfig) -> TokenStore:
    try:
        opened = TokenStore.open(store.path)
        opened.check_sizes()
        return opened
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def _check_units(store: TokenStore, data: DataConfig) -> None:
    sequence_length = data.sequence_length
    if data.packing != "stream":
        PackedRows.open(store, data.packing, sequence_length)
    elif store.num_tokens < sequence_length + 1:
        raise ConfigError(
            f"data.sequence_length: found {sequence_length}, but {store.path} holds only {store.num_tokens} tokens; "
            f"allowed: at most {store.num_tokens - 1}, or a larger store"
        )


def _check_tokenizers(stores: list[TokenStore]) -> None:
    """Ids mean the same text in every store; one without a tokenizer is taken at its word."""
    built_with: dict[str, Path] = {}  # tokenizer digest -> the first store with it
    for store in stores:
        if store.manifest.tokenizer:
            built_with.setdefault(store.manifest.tokenizer.digest, store.path)
    if len(built_with) > 1:
        raise ConfigError(
            "data.train and data.validation: the stores were built with different tokenizers ("
            + ", ".join(f"{path}: {digest[:8]}" for digest, path in built_with.items())
            + "); build them with the same one"
        )


def _with_vocab_size(config: TrainConfig, stores: list[TokenStore]) -> TrainConfig:
    needed = max(store.manifest.vocab_size for store in stores)
    if config.model.vocab_size is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=needed))
    if config.model.vocab_size < needed:
        raise ConfigError(
            f"model.vocab_size: found {config.model.vocab_size}, but the stores hold ids of a vocabulary of {needed}; "
            f"allowed: {needed} or more, or null for the stores' own"
        )
    return config


def _check_checkpoint(config: TrainConfig) -> None:
    """Stop now, not after minutes of start-up, when the run could not continue with this configuration."""
    resume = config.checkpoint.resume
    if resume == "never":
        return
    if resume == "auto":
        found = list_checkpoints(Path(config.run_dir) / "checkpoints")
        if not found:
            return
        folder = found[-1]
    else:
        folder = Path(resume)
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        if resume == "auto":
            return  # the ranks fall back to an older one, or say what is wrong
        raise
    check_resume(config, manifest)
