"""One block of attention with its log-sum-exp, and its gradients given the log-sum-exp of all blocks: for the ring.

`F.scaled_dot_product_attention` gives no log-sum-exp, so the kernels under it are called. Where there is none (fp32 on
CUDA) plain products serve.

Legend: B batch, H query heads, G key and value heads, S queries, T keys, K head size.
"""

import math

import torch
from torch import Tensor

from megalite.layers.attend import seen_from

aten = torch.ops.aten


def block_forward(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, causal: bool, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(K)) V, normalised within the block, and log sum exp of the scores: (B, H, S, K), (B, H, S).

    `causal`: query i meets keys up to i. `seen`, (B, 1, S, T), says instead which keys each query meets, perhaps none:
    its result is then 0, of weight exp(-inf); the kernels know no such queries, so products serve.
    """
    q, k, v = _same_heads(q_BHSK, k_BGTK, v_BGTK)
    if seen is not None:
        return plain_forward(q, k, v, seen)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if _has_flash(q):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return plain_forward(q, k, v, _causal(q, k) if causal else None)


def block_backward(
    grad_BHSK: Tensor,
    q_BHSK: Tensor,
    out_BHSK: Tensor,
    log_sum_BHS: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    causal: bool,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one block of many; `out` and `log_sum` are those of the whole attention."""
    q, k, v = _same_heads(q_BHSK, k_BGTK, v_BGTK)
    saved = (q, k, v, out_BHSK, log_sum_BHS)
    if seen is not None:
        grads = plain_backward(grad_BHSK, *saved, seen)
    elif q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_BHSK, *saved, 0.0, causal)
    elif _has_flash(q):
        zero = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so no random state
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = aten._scaled_dot_product_flash_attention_backward(grad_BHSK, *saved, *lengths, 0.0, causal, zero, zero)
    else:
        grads = plain_backward(grad_BHSK, *saved, _causal(q, k) if causal else None)
    grad_q, *grads_kv = grads
    # The heads that shared one of k and v add up.
    grad_k, grad_v = (grad.unflatten(1, (k_BGTK.shape[1], -1)).sum(2) for grad in grads_kv)
    return grad_q, grad_k, grad_v


def plain_forward(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """`block_forward` in products, for as many heads of k and v as of q."""
    scores = _scores(q, k, seen)
    log_sum = scores.logsumexp(dim=-1)
    return _probabilities(scores, log_sum).to(v.dtype) @ v, log_sum


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_backward` in products (Dao 2023, FlashAttention-2, section 2.3)."""
    probabilities = _probabilities(_scores(q, k, seen), log_sum)
    along_out = (grad * out).sum(dim=-1, keepdim=True)
    grad_scores = (probabilities * (grad @ v.mT - along_out) / math.sqrt(q.shape[-1])).to(q.dtype)
    return grad_scores @ k, grad_scores.mT @ q, probabilities.to(grad.dtype).mT @ grad


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return seen_from(torch.arange(q.shape[2], device=q.device), k.shape[2])


def _scores(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def _probabilities(scores: Tensor, log_sum: Tensor) -> Tensor:
    """exp(score - log_sum); 0 for a query that meets no key, whose log_sum is minus infinity."""
    return (scores - log_sum.clamp(min=torch.finfo(log_sum.dtype).min)[..., None]).exp()


def _has_flash(q: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _same_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    repeats = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
