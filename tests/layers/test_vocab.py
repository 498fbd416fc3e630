"""Embedding, head and cross entropy split along the vocabulary, against the whole ones."""

import pytest
import torch
import torch.nn.functional as F

from megalite import comm
from megalite.layers.shard import Init
from megalite.layers.vocab import VocabParallelEmbedding, VocabParallelLinear, vocab_parallel_cross_entropy
from megalite.mesh import Axis
from tests.layers.parallel import check_layer, random_tensors

SIZES = [1, 2, 4]
VOCAB = 300  # padded to 384: on 4 ranks the last holds 12 real rows and 84 of padding
SINGLE = Axis("tensor", 1, 0, None)


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


@pytest.mark.parametrize("tensor", SIZES)
def test_head_and_cross_entropy(tensor):
    labels = tokens(seed=4)
    labels[0, :2] = -100
    labels[1, 0] = VOCAB - 1

    def losses(layer, axis, x):
        return vocab_parallel_cross_entropy(layer(x), labels, VOCAB, axis)

    def plain(weights, x):
        logits = x @ weights["weight"].t()
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)

    x = random_tensors(1, x=(2, 7, 6))["x"]
    check_layer(tensor, lambda axis: VocabParallelLinear(VOCAB, 6, axis, Init()), losses, plain, x)


@pytest.mark.parametrize("vocab", [60, 128])
def test_ranks_with_nothing_but_padding(vocab):
    labels = tokens() % vocab
    check_layer(
        4,
        lambda axis: VocabParallelLinear(vocab, 6, axis, Init()),
        lambda layer, axis, x: vocab_parallel_cross_entropy(layer(x), labels, vocab, axis),
        lambda weights, x: F.cross_entropy((x @ weights["weight"].t()).transpose(1, 2), labels, reduction="none"),
        random_tensors(1, x=(2, 7, 6))["x"],
    )


def test_cross_entropy_without_its_sum_is_seen():
    def forget() -> None:
        honest = comm.all_reduce
        comm.all_reduce = lambda x, axis, op="sum": x if op == "sum" else honest(x, axis, op)

    labels = tokens()
    with pytest.raises(AssertionError, match="output"):
        check_layer(
            2,
            lambda axis: VocabParallelLinear(VOCAB, 6, axis, Init()),
            lambda layer, axis, x: vocab_parallel_cross_entropy(layer(x), labels, VOCAB, axis),
            lambda weights, x: F.cross_entropy((x @ weights["weight"].t()).transpose(1, 2), labels, reduction="none"),
            random_tensors(1, x=(2, 7, 6))["x"],
            plant=forget,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_fp32_losses(dtype):
    logits = (8 * torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    labels = tokens((2, 5))
    losses = vocab_parallel_cross_entropy(logits, labels, VOCAB, SINGLE)
    assert losses.dtype == torch.float32
    wanted = F.cross_entropy(logits[..., :VOCAB].float().transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=0)
    losses.sum().backward()
    assert logits.grad.dtype == dtype
    assert logits.grad[..., VOCAB:].eq(0).all()


def test_large_logits_do_not_overflow():
    logits = torch.zeros(1, 1, 128)
    logits[..., 5] = 1e4
    assert vocab_parallel_cross_entropy(logits, torch.tensor([[5]]), 100, SINGLE).item() == 0.0
    assert vocab_parallel_cross_entropy(logits, torch.tensor([[6]]), 100, SINGLE).item() == 1e4
