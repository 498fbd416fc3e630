"""The loss of a language model without its logits: head and cross-entropy in one, a few tokens at a time.

The logits of a batch, tokens x vocabulary in fp32, would be its largest tensor by far. Here they exist for one chunk of
tokens at a time. Their gradient is made while they are there, and with it the gradients of the head's input and weight:
the backward pass only scales them, so nothing is computed twice (as Liger Kernel does, Hsu et al. 2024).

Legend: B batch, S sequence, D hidden size, V vocabulary, N tokens (B S), C tokens of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite import comm
from megalite.layers.region import SEQUENCE_DIM
from megalite.mesh import Axis

CHUNK_ELEMENTS = 1 << 23  # logits that exist at a time: 32 MiB in fp32, about what a CPU's cache holds
GPU_CHUNKS = 16  # times as many on a GPU, whose products want more rows; not measured yet


@dataclass(frozen=True)
class LossTerms:
    """What is added to the negative log-likelihood of a label, by token.

    `label_smoothing` e: the label is right with probability 1 - e, and with e any of the V tokens (Szegedy et al. 2016,
    section 7). `z_loss` z: + z (log sum exp logits)^2, which keeps the logits small (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Target:
    """What a model is trained towards: labels_BS, int64, ignored where negative; how each token counts; loss terms.

    With `weights_BS`, at least fp32 and of the order of one (fp16 gradients are made with them), the loss is the
    weighted sum over tokens; without, it is each token's bare negative log-likelihood, for evaluation.
    """

    labels_BS: Tensor
    weights_BS: Tensor | None = None
    terms: LossTerms = LossTerms()

    def padded(self, count: int) -> "Target":
        """With `count` positions behind the end that do not count."""
        weights_BS = self.weights_BS
        return Target(
            F.pad(self.labels_BS, (0, count), value=-1),
            None if weights_BS is None else F.pad(weights_BS, (0, count)),
            self.terms,
        )


@dataclass(frozen=True)
class Vocabulary:
    """What the logits are over: the real size, without padding, split over `axis`.

    `soft_cap` c: logits become c tanh(logit / c) (Gemma 2, Riviere et al. 2024).
    """

    size: int
    axis: Axis
    soft_cap: float | None = None


def token_losses(x_BSD: Tensor, weight: Tensor, labels_BS: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Negative log-likelihoods of the labels in nats, (B, S) in at least fp32; no gradient flows.

    `x_BSD` and `weight` as in `linear_cross_entropy`. A negative label is ignored: 0.
    Communication: two all-reduces a chunk, of its C maxima and 2 C sums.
    """
    with torch.no_grad():
        x_ND = _whole(x_BSD, vocabulary.axis).flatten(0, 1)
        chunks = _chunks(weight, x_ND, labels_BS.flatten())
        losses = [_Chunk(x, weight, labels, vocabulary, LossTerms()).losses_C for x, labels in chunks]
    return torch.cat(losses).view(labels_BS.shape)


def linear_cross_entropy(x_BSD: Tensor, weight: Tensor, target: Target, vocabulary: Vocabulary) -> Tensor:
    """sum over tokens of weight_t (log sum_v exp(x_t W_v) - x_t W_label + terms), in nats: a scalar.

    Shapes: x_BSD, equal on all ranks or parts of the sequence; weight (padded V / size, D), this rank's rows.
    Communication: forward that of `token_losses`, and the all-gather of x where it comes in parts; backward one
    all-reduce of the gradient of x, or one reduce-scatter.
    """
    assert target.weights_BS is not None
    x_ND = _whole(x_BSD, vocabulary.axis).flatten(0, 1)
    labels_N, weights_N = target.labels_BS.flatten(), target.weights_BS.flatten()
    return _LinearCrossEntropy.apply(x_ND, weight, labels_N, weights_N, vocabulary, target.terms)


def _whole(x_BSD: Tensor, axis: Axis) -> Tensor:
    return comm.enter(x_BSD, axis, SEQUENCE_DIM) if axis.sequence else comm.copy(x_BSD, axis)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        vocabulary: Vocabulary,
        terms: LossTerms,
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_x_ND, grad_weight = torch.empty_like(x_ND), torch.zeros_like(weight, dtype=wide)
        losses, done = [], 0
        for x, labels, weights in _chunks(weight, x_ND, labels_N, torch.where(labels_N >= 0, weights_N, 0.0)):
            chunk = _Chunk(x, weight, labels, vocabulary, terms)
            losses.append(weights * chunk.losses_C)
            grads = chunk.logit_gradients(weights).to(x.dtype)
            torch.mm(grads, weight, out=grad_x_ND[done : done + len(x)])
            if grads.dtype == wide:
                grad_weight.addmm_(grads.t(), x)
            else:
                grad_weight += grads.t() @ x
            done += len(x)
        ctx.save_for_backward(grad_x_ND, grad_weight)
        ctx.dtype = weight.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x_ND, grad_weight = ctx.saved_tensors
        # In at least fp32: rounded to the dtype of x, one factor would scale all gradients before the head alike.
        grad_x_ND = (grad_x_ND.to(grad_weight.dtype) * grad).to(grad_x_ND.dtype)
        return grad_x_ND, (grad_weight * grad).to(ctx.dtype), None, None, None, None


def _chunks(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of tensors that begin with the dim of tokens, each with `CHUNK_ELEMENTS` logits at most."""
    num_tokens = len(tensors[0])
    at_once = CHUNK_ELEMENTS * (1 if weight.device.type == "cpu" else GPU_CHUNKS)
    num_chunks = max(1, -(-num_tokens * weight.shape[0] // at_once))
    size = max(1, -(-num_tokens // num_chunks))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class _Chunk:
    """The logits of C tokens, turned in place into exp(logit - largest), and into their gradient at the end."""

    def __init__(
        self, x_CD: Tensor, weight: Tensor, labels_C: Tensor, vocabulary: Vocabulary, terms: LossTerms
    ) -> None:
        """Makes the logits, and `losses_C`: 0 where the label is negative."""
        axis = vocabulary.axis
        self._labels_C, self._vocabulary, self._terms = labels_C, vocabulary, terms
        logits = F.linear(x_CD, weight)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._slope: Tensor | None = None  # of the soft cap
        if vocabulary.soft_cap is not None:
            squashed = torch.tanh(scores / vocabulary.soft_cap)
            self._slope, scores = 1 - squashed.square(), squashed * vocabulary.soft_cap
        width = scores.shape[1]
        self._real = min(max(vocabulary.size - axis.rank * width, 0), width)  # the rest is padding
        scores[:, self._real :] = -torch.inf
        local_C, held_C = local_rows(labels_C, width, axis)
        peak_C = comm.all_reduce(scores.amax(dim=-1), axis, "max")
        target_C = torch.where(held_C, scores.gather(1, local_C[:, None])[:, 0] - peak_C, 0.0)
        scores.sub_(peak_C[:, None])
        smoothed = [scores[:, : self._real].sum(dim=-1)] if terms.label_smoothing else []
        sums = torch.stack([target_C, *smoothed, scores.exp_().sum(dim=-1)])
        target_C, *smoothed, self._total_C = comm.all_reduce(sums, axis).unbind()
        self._log_sum_C = peak_C + self._total_C.log()
        self._scores = scores
        losses_C = self._total_C.log() - target_C
        for sum_C in smoothed:
            losses_C = losses_C + terms.label_smoothing * (target_C - sum_C / vocabulary.size)
        if terms.z_loss:
            losses_C = losses_C + terms.z_loss * self._log_sum_C.square()
        self.losses_C = torch.where(labels_C >= 0, losses_C, 0.0)

    def logit_gradients(self, weights_C: Tensor) -> Tensor:
        """w_t d loss_t / d logit_tv = w_t ((1 + 2 z log_sum_t) softmax_tv - (1 - e) [v = label_t] - e / V)."""
        terms, grads = self._terms, self._scores
        weights_C = weights_C.to(grads.dtype)
        grads.mul_((weights_C * (1 + 2 * terms.z_loss * self._log_sum_C) / self._total_C)[:, None])
        if terms.label_smoothing:
            grads[:, : self._real] -= (weights_C * (terms.label_smoothing / self._vocabulary.size))[:, None]
        local_C, held_C = local_rows(self._labels_C, grads.shape[1], self._vocabulary.axis)
        at_label_C = torch.where(held_C, (terms.label_smoothing - 1) * weights_C, 0.0)
        grads.scatter_add_(1, local_C[:, None], at_label_C[:, None])
        return grads if self._slope is None else grads.mul_(self._slope)


def local_rows(tokens: Tensor, width: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Each token's row on this rank, and whether it is held here; row 0 stands in where it is not."""
    local = tokens - axis.rank * width
    held = (local >= 0) & (local < width)
    return torch.where(held, local, 0), held
