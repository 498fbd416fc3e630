"""Embedding and head split along the vocabulary, against the whole ones."""

import pytest
import torch
import torch.nn.functional as F

from megalite import comm
from megalite.layers.cross_entropy import Vocabulary
from megalite.layers.shard import Init
from megalite.layers.vocab import VocabParallelEmbedding, VocabParallelLinear
from tests.layers.parallel import check_layer, random_tensors

SIZES = [1, 2, 4]
VOCAB = 300  # padded to 384: on 4 ranks the last holds 12 real rows and 84 of padding


def tokens(shape=(2, 7), seed=3):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tensor", SIZES)
def test_embedding(tensor):
    check_layer(
        tensor,
        lambda axis: VocabParallelEmbedding(VOCAB, 6, axis, Init()),
        lambda layer, axis, tokens_BS: layer(tokens_BS),
        lambda weights, tokens_BS: F.embedding(tokens_BS, weights["weight"]),
        tokens(),
    )


@pytest.mark.parametrize("tensor", [2, 4])
def test_embedding_to_parts_of_the_sequence(tensor):
    check_layer(
        tensor,
        lambda axis: VocabParallelEmbedding(VOCAB, 6, axis, Init()),
        lambda layer, axis, tokens_BS: comm.gather(layer(tokens_BS), axis, dim=1),
        lambda weights, tokens_BS: F.embedding(tokens_BS, weights["weight"]),
        tokens((2, 8)),
        sequence=True,
    )


@pytest.mark.parametrize("tensor", SIZES)
def test_logits(tensor):
    check_layer(
        tensor,
        lambda axis: VocabParallelLinear(Vocabulary(VOCAB, axis), 6, Init()),
        lambda layer, axis, x: comm.gather(layer(x, None), axis, dim=-1)[..., :VOCAB],
        lambda weights, x: x @ weights["weight"].t(),
        random_tensors(1, x=(2, 7, 6))["x"],
    )
