"""Loss, perplexity and bits per byte against a count by hand, for one process and for two."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.config.schema import ParallelConfig
from megalite.data.format import TokenStore
from megalite.data.writer import StoreWriter
from megalite.mesh import build_mesh, single_mesh
from megalite.metrics.evaluation import evaluate_store
from megalite.objectives import Batch, CausalLM
from tests.ranks import run_ranks

TOKENS = [[1, 2, 3, 4, 5], [6], [2, 2]]
NUM_BYTES = [11, 2, 5]


@pytest.fixture
def store(tmp_path) -> Path:
    with StoreWriter(tmp_path / "store", vocab_size=10, end_of_document=9) as writer:
        for tokens, num_bytes in zip(TOKENS, NUM_BYTES, strict=True):
            writer.add_document(np.array(tokens), num_bytes=num_bytes)
    return tmp_path / "store"


def losses(batch: Batch) -> torch.Tensor:
    """A model that is as surprised as the label is large."""
    return torch.where(batch.mask_BS, batch.labels_BS.float(), 0.0)


def figures(store: Path, mesh) -> dict[str, float]:
    return evaluate_store(losses, CausalLM(2), TokenStore.open(store), "words", mesh, micro_batch_size=2)


def expected() -> dict[str, float]:
    nats, count = sum(map(sum, TOKENS)), sum(map(len, TOKENS))
    return {
        "eval/words/loss": nats / count,
        "eval/words/perplexity": math.exp(nats / count),
        "eval/words/bits_per_byte": nats / math.log(2) / sum(NUM_BYTES),
    }


def test_one_process(store):
    assert figures(store, single_mesh(torch.device("cpu"))) == pytest.approx(expected())


def on_rank(store: Path) -> dict[str, float]:
    return figures(store, build_mesh(ParallelConfig(), torch.device("cpu")))


def test_two_replicas_share_the_windows_and_agree(store):
    assert run_ranks(2, on_rank, store) == [pytest.approx(expected())] * 2
