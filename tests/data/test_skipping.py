"""Skipped documents count nowhere; everything else is the sample that it was."""

import numpy as np
import pytest
import torch

from megalite.config.loader import load_config
from megalite.config.schema import DataConfig
from megalite.data.dataset import build_dataset
from megalite.data.format import TokenStore
from megalite.data.packing import write_packing
from megalite.errors import ConfigError
from megalite.objectives import CausalLM
from tests.runs import VOCAB, write_store

END = VOCAB - 1
S = 32


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    paths = [write_store(root / "a"), write_store(root / "b", seed=3)]
    for path in paths:
        for packing in ("best_fit", "documents"):
            write_packing(TokenStore.open(path), packing, S)
    return paths


def dataset(stores, packing="stream", **changes):
    train = [{"path": str(path)} for path in stores]
    data = load_config(DataConfig, {"train": train, "sequence_length": S, "packing": packing, **changes})
    return build_dataset(data, 8, seed=7)


SKIPPED = ["a:0", "a:17", "b:5", "b:59"]


@pytest.mark.parametrize("packing", ["stream", "best_fit", "documents"])
def test_exactly_the_labels_of_skipped_documents_do_not_count(stores, packing):
    whole, without = dataset(stores, packing), dataset(stores, packing, skip_documents=SKIPPED)
    objective = CausalLM(S)
    masked = 0
    for index in range(0, 160):
        before = objective.batch(torch.from_numpy(whole.samples([index]).astype(np.int64)))
        after = objective.batch(torch.from_numpy(without.samples([index]).astype(np.int64)))
        assert torch.equal(before.tokens_BS, after.tokens_BS)
        assert torch.equal(before.labels_BS, after.labels_BS)
        # Which document a label is of, from the parts of the sample alone.
        names = []
        for part in whole.documents([index]):
            names += [f"{'ab'[part.source]}:{part.document}"] * (part.stop - part.start)
        names = names[1:] if packing == "stream" else names
        counts = [name not in SKIPPED for name in names] + [False] * (S - len(names))
        assert after.mask_BS[0].tolist() == counts
        masked += int((before.mask_BS & ~after.mask_BS).sum())
    assert masked > 50


def test_documents_are_numbered_as_without_skipping(stores):
    """Attention within documents sees the same neighbours, but for the skipped ones."""
    objective = CausalLM(S, END)
    whole, without = dataset(stores), dataset(stores, skip_documents=["a:3"])
    for index in range(60):
        before = objective.batch(torch.from_numpy(whole.samples([index]).astype(np.int64))).documents_BS[0]
        after = objective.batch(torch.from_numpy(without.samples([index]).astype(np.int64))).documents_BS[0]
        kept = after > 0
        assert torch.equal(before[kept] == before[kept][0], after[kept] == after[kept][0])
        assert torch.equal(before[kept].diff() > 0, after[kept].diff() > 0)


@pytest.mark.parametrize(
    ("name", "says"),
    [("c:1", "expected SOURCE:INDEX"), ("a:60", "documents 0 to 59"), ("a:-1", "expected SOURCE"), ("a", "expected")],
)
def test_a_document_that_is_none_is_refused_by_its_key(stores, name, says):
    with pytest.raises(ConfigError, match=f"data.skip_documents: found '{name}'.*{says}"):
        dataset(stores, skip_documents=[name])
