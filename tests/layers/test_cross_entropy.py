"""The loss without the logits against F.cross_entropy on all of them: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from megalite import comm
from megalite.layers import cross_entropy
from megalite.layers.cross_entropy import LossTerms, Target, Vocabulary, linear_cross_entropy, token_losses
from megalite.layers.shard import Init
from megalite.layers.vocab import VocabParallelLinear
from megalite.mesh import Axis
from tests.layers.parallel import check_layer, random_tensors
from tests.layers.plants import cross_entropy_forgets_sum

SINGLE = Axis("tensor", 1, 0, None)
BARE = LossTerms()
VOCAB, SHAPE = 300, (2, 8)  # padded to 384: on 4 ranks the last holds 12 real rows and 84 of padding
VOCABULARY = Vocabulary(VOCAB, SINGLE)
TERMS = LossTerms(label_smoothing=0.1, z_loss=0.01)
WEIGHTS = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def labels_of(vocab, ignored=False):
    labels = torch.randint(vocab, SHAPE, generator=torch.Generator().manual_seed(4))
    labels[1, 0] = vocab - 1
    if ignored:
        labels[0, :2] = -100
    return labels


def plain(weights, x, labels, terms, soft_cap):
    """The weighted sum, from torch's own label smoothing and the z-loss written out."""
    logits = x @ weights["weight"].t()
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=-100, label_smoothing=terms.label_smoothing
    )
    losses = losses + terms.z_loss * logits.logsumexp(-1).square() * (labels >= 0)
    return (losses * WEIGHTS).sum()


def check(tensor, vocab=VOCAB, terms=BARE, soft_cap=None, sequence=False, chunk=None, **options):
    """`chunk`: logits at a time on a rank."""
    labels = labels_of(vocab, ignored=True)

    def loss(layer, axis, x):
        if chunk is not None:
            cross_entropy.CHUNK_ELEMENTS = chunk
        return layer(comm.scatter(x, axis, 1) if sequence else x, Target(labels, WEIGHTS, terms))

    check_layer(
        tensor,
        lambda axis: VocabParallelLinear(Vocabulary(vocab, axis, soft_cap), 6, Init()),
        loss,
        lambda weights, x: plain(weights, x, labels, terms, soft_cap),
        random_tensors(1, x=(*SHAPE, 6))["x"],
        sequence=sequence,
        **options,
    )


@pytest.mark.parametrize("terms", [BARE, LossTerms(label_smoothing=0.1), LossTerms(z_loss=0.01), TERMS])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_loss_and_gradients(tensor, terms):
    check(tensor, terms=terms)


@pytest.mark.parametrize("tensor", [1, 2])
def test_capped_logits(tensor):
    check(tensor, terms=TERMS, soft_cap=2.0)


@pytest.mark.parametrize("tensor", [2, 4])
def test_from_parts_of_the_sequence(tensor):
    check(tensor, terms=TERMS, sequence=True)


@pytest.mark.parametrize("chunk", [1, 5 * 384, 7 * 384, 10**9])
def test_any_chunk_gives_the_same(chunk, monkeypatch):
    """One token at a time, uneven chunks, all at once."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    check(1, terms=TERMS)
    check(2, terms=TERMS, chunk=chunk)


@pytest.mark.parametrize("vocab", [60, 128])
def test_ranks_with_nothing_but_padding(vocab):
    check(4, vocab, TERMS)


def test_a_missing_sum_is_seen():
    with pytest.raises(AssertionError, match="output"):
        check(2, plant=cross_entropy_forgets_sum)


def head(dtype, std=1.0):
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(*SHAPE, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.zeros(384, 32)
    weight[:VOCAB] = std * torch.randn(VOCAB, 32, generator=generator)
    return x_BSD, weight.to(dtype).requires_grad_()


def test_the_losses_of_tokens_are_bare_and_carry_no_gradient():
    x_BSD, weight = head(torch.float64)
    labels = labels_of(VOCAB, ignored=True)
    found = token_losses(x_BSD, weight, labels, VOCABULARY)
    assert not found.requires_grad
    wanted = F.cross_entropy((x_BSD @ weight[:VOCAB].t()).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(found, wanted.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    """Against fp32 on the same rounded logits: only the gradients' products round."""
    x_BSD, weight = head(dtype, std=0.3)
    labels, weights = labels_of(VOCAB), WEIGHTS.float()
    loss = linear_cross_entropy(x_BSD, weight, Target(labels, weights), VOCABULARY)
    assert loss.dtype == torch.float32
    loss.backward(torch.tensor(1 / 3))
    x, w = x_BSD.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    logits = x @ w[:VOCAB].t()
    rounded = logits + (F.linear(x_BSD, weight)[..., :VOCAB].float() - logits).detach()
    wanted = (F.cross_entropy(rounded.transpose(1, 2), labels, reduction="none") * weights).sum()
    (wanted / 3).backward()
    torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-6)
    for found, reference in ((x_BSD, x), (weight, w)):
        assert found.grad.dtype == dtype
        error = (found.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 2**-8
        # No systematic scale: the projection on the right gradient is 1 but for rounding that averages out.
        scale = (found.grad.float() * reference.grad).sum() / reference.grad.square().sum()
        assert abs(scale - 1) < 2**-11
    assert weight.grad[VOCAB:].eq(0).all()


def test_large_logits_do_not_overflow():
    x_BSD, weight = torch.ones(1, 1, 1), torch.zeros(128, 1)
    weight[5] = 1e4
    assert token_losses(x_BSD, weight, torch.tensor([[5]]), Vocabulary(100, SINGLE)).item() == 0.0
    assert token_losses(x_BSD, weight, torch.tensor([[6]]), Vocabulary(100, SINGLE)).item() == 1e4


def test_the_logits_never_exist_at_once(monkeypatch):
    """The largest tensor that autograd or the loss ever holds is a chunk's."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4 * 384)
    sizes = []
    honest = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: sizes.append(honest(*args).numel()) or honest(*args))
    x_BSD, weight = head(torch.float32)
    linear_cross_entropy(x_BSD, weight, Target(labels_of(VOCAB), WEIGHTS.float()), VOCABULARY).backward()
    assert sizes == [4 * 384] * 4
