"""The ends of a language model, split over the tensor axis along the vocabulary.

The vocabulary is padded to a constant multiple whatever the layout, so that the same run has the same rows on any
number of ranks; padded rows are zero, never looked up, and count as minus infinity in the softmax.

Legend: B batch, S sequence, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import comm
from megalite.config.validate import VOCAB_MULTIPLE
from megalite.layers.region import column_linear, sum_partial
from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


def vocab_shard(vocab_size: int, hidden_size: int) -> Shard:
    """Rows of the vocabulary split over the tensor axis: of the embedding, and of the output head."""
    return Shard((vocab_size, hidden_size), 0, (vocab_size,), multiple=VOCAB_MULTIPLE)


class VocabParallelEmbedding(nn.Module):
    """Y = E[tokens] with the rows of E split: rank i looks up the tokens it holds, zero elsewhere, and the sum is Y.

    Shapes: tokens_BS (int64, 0 <= token < vocab_size) -> (B, S, D), equal on all ranks or parts of the sequence.
    Communication: see `region.sum_partial`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, axis: Axis, init: Init) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.axis = vocab_size, hidden_size, axis
        self.weight = make_parameter(vocab_shard(vocab_size, hidden_size), init, axis)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """See the class."""
        if self.axis.size == 1:
            return F.embedding(tokens_BS, self.weight)
        local_BS, held_BS = _local_rows(tokens_BS, self.weight.shape[0], self.axis)
        x_BSD = F.embedding(local_BS, self.weight) * held_BS.unsqueeze(-1)
        return sum_partial(x_BSD, self.axis)

    def extra_repr(self) -> str:
        """Unsharded size and this rank's place."""
        return f"{self.vocab_size} x {self.hidden_size}, rank {self.axis.rank} of {self.axis.size}"


class VocabParallelLinear(nn.Module):
    """The output head: logits = X W^T with the rows of W (the vocabulary) split; no bias.

    `weight` may be the embedding's (tied) or its own.

    Shapes: x_BSD, equal on all ranks or parts of the sequence -> logits (B, S, padded V / size), split; padded columns
    hold no meaning. Communication: see `region.column_linear`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, axis: Axis, init: Init) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.axis = vocab_size, hidden_size, axis
        self.weight = make_parameter(vocab_shard(vocab_size, hidden_size), init, axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class."""
        return vocab_parallel_logits(x_BSD, self.weight, self.axis)

    def extra_repr(self) -> str:
        """Unsharded size and this rank's place."""
        return f"{self.hidden_size} -> {self.vocab_size}, rank {self.axis.rank} of {self.axis.size}"


def vocab_parallel_logits(x_BSD: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """X W^T for a weight whose rows are split; see `VocabParallelLinear`."""
    return column_linear(x_BSD, weight, None, axis)


def vocab_parallel_cross_entropy(logits_local: Tensor, labels_BS: Tensor, vocab_size: int, axis: Axis) -> Tensor:
    """Negative log-likelihood of each label, in nats, from logits split along the vocabulary.

    loss = log(sum over all v of exp(logit_v - m)) + m - logit_label, with m the largest logit of the token.

    Shapes: logits_local (B, S, padded V / size) of any floating dtype, labels_BS int64 -> losses_BS in fp32 (float64
    for float64). A negative label is ignored: loss 0, gradient 0.
    Communication: forward two all-reduces, of B*S maxima and of 2*B*S sums; backward none.
    """
    return _CrossEntropy.apply(logits_local, labels_BS, vocab_size, axis)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits in their own dtype and one number a token; the softmax is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels_BS: Tensor, vocab_size: int, axis: Axis) -> Tensor:
        width = logits.shape[-1]
        local_BS, held_BS = _local_rows(labels_BS, width, axis)
        scores = _masked_scores(logits, vocab_size, axis)
        peak_BS = comm.all_reduce(scores.amax(dim=-1), axis, "max")
        target_BS = scores.gather(-1, local_BS.unsqueeze(-1)).squeeze(-1) - peak_BS
        total_BS = scores.sub_(peak_BS.unsqueeze(-1)).exp_().sum(dim=-1)
        sums_2BS = comm.all_reduce(torch.stack([total_BS, torch.where(held_BS, target_BS, 0.0)]), axis)
        log_total_BS = sums_2BS[0].log()
        ctx.save_for_backward(logits, labels_BS, peak_BS + log_total_BS)
        ctx.vocab_size, ctx.axis = vocab_size, axis
        return torch.where(labels_BS >= 0, log_total_BS - sums_2BS[1], 0.0)

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels_BS, log_sum_BS = ctx.saved_tensors
        local_BS, held_BS = _local_rows(labels_BS, logits.shape[-1], ctx.axis)
        grads = _masked_scores(logits, ctx.vocab_size, ctx.axis).sub_(log_sum_BS.unsqueeze(-1)).exp_()  # softmax
        grads.scatter_add_(-1, local_BS.unsqueeze(-1), -held_BS.unsqueeze(-1).to(grads.dtype))
        grads.mul_(torch.where(labels_BS >= 0, grad_BS, 0.0).unsqueeze(-1))
        return grads.to(logits.dtype), None, None, None


def _masked_scores(logits: Tensor, vocab_size: int, axis: Axis) -> Tensor:
    """A copy of the logits in at least fp32, minus infinity where the vocabulary is padded."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    real = vocab_size - axis.rank * logits.shape[-1]  # columns before the padding begins
    if real < logits.shape[-1]:
        scores[..., max(0, real) :] = -torch.inf
    return scores


def _local_rows(tokens: Tensor, width: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Each token's row on this rank, and whether it is held here; row 0 stands in where it is not."""
    local = tokens - axis.rank * width
    held = (local >= 0) & (local < width)
    return torch.where(held, local, 0), held
