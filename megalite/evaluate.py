"""Evaluate a checkpoint: loss, perplexity and bits per byte of whole documents, by source."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megalite.config.schema import EvaluateConfig, StoreConfig
from megalite.data.format import TokenStore
from megalite.errors import ConfigError
from megalite.layers.cross_entropy import Target
from megalite.metrics.evaluation import evaluate_store
from megalite.objectives import Batch, build_objective, documents_of
from megalite.runs import LoadedRun, load_run
from megalite.tokenizer import load_tokenizer


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """The figures `eval/<source>/loss`, `/perplexity`, `/bits_per_byte` of every store in `config.data`.

    Raises `ConfigError` when neither the command nor the run names a store, or when a store was built with another
    tokenizer or for a larger vocabulary than the model's.
    """
    run = load_run(config.run_dir, config.checkpoint)
    stores = [(store.source, TokenStore.open(store.path)) for store in _stores(config, run)]
    tokenizer = Path(config.run_dir) / "tokenizer"
    digest = load_tokenizer(tokenizer).digest if tokenizer.is_dir() else None
    for _, store in stores:
        record = store.manifest.tokenizer
        if digest and record and record.digest != digest:
            raise ConfigError(
                f"data: {store.path} was built with another tokenizer ({record.name}, digest {record.digest[:8]}) than "
                f"the run's ({digest[:8]}): its ids mean other text; build the store with {tokenizer}"
            )
        if store.manifest.vocab_size > run.config.model.known_vocab_size:
            raise ConfigError(
                f"data: {store.path} holds ids of a vocabulary of {store.manifest.vocab_size}, the model knows "
                f"{run.config.model.vocab_size}; build the store with the run's tokenizer, {config.run_dir}/tokenizer"
            )
    data = run.config.data
    objective = build_objective(run.config.objective, data, stores[0][1].manifest.end_of_document)

    @torch.no_grad()
    def losses(batch: Batch) -> torch.Tensor:
        batch = batch.to(run.mesh.device)
        losses_BS = run.model(
            batch.tokens_BS, Target(batch.labels_BS), documents=documents_of(batch.documents_BS, data)
        )
        return torch.where(batch.mask_BS, losses_BS, 0.0)

    figures: dict[str, float] = {}
    for source, store in stores:
        figures |= evaluate_store(losses, objective, store, source, run.mesh, config.micro_batch_size)
    return figures


def _stores(config: EvaluateConfig, run: LoadedRun) -> Sequence[StoreConfig]:
    stores = config.data or run.config.data.validation
    if not stores:
        raise ConfigError(f"data: the run {config.run_dir} has no validation stores; name one with data=PATH")
    return stores
