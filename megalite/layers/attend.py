"""Attention itself, on heads that are here whole: which tokens see which, and the weighted sum.

Legend: B batch, S new tokens, T tokens attended to, H query heads, G key and value heads, K head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(past: int, new: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where one of `new` tokens may look at one of `past + new`, (S, T); None where that is plain causal.

    `window`: a token sees so many, itself included (Beltagy et al. 2020, as in Jiang et al. 2023, Mistral).
    """
    total = past + new
    if past == 0 and (window is None or window >= total):
        return None
    return seen_from(torch.arange(past, total, device=device), total, window)


def seen_from(places_S: Tensor, total: int, window: int | None = None) -> Tensor:
    """True where the tokens at `places_S` may look at each of `total` tokens, (S, T): at those up to themselves."""
    distance_ST = places_S[:, None] - torch.arange(total, device=places_S.device)
    return (distance_ST >= 0) & (distance_ST < (total if window is None else window))


def attend(
    q_BSHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    mask_ST: Tensor | None = None,
    dropout: float = 0.0,
    soft_cap: float | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(K) + mask) V: (B, S, H, K). `mask_ST` as `attention_mask` gives it, or (B, 1, S, T).

    Each key head serves H / G consecutive query heads. `soft_cap` c: scores become c tanh(score / c) (Gemma 2, Riviere
    et al. 2024), which no fused kernel takes: the S x T scores then exist.
    """
    shared = q_BSHK.shape[2] // k_BTGK.shape[2]
    grouped = shared > 1
    if grouped and (soft_cap is not None or q_BSHK.dtype not in (torch.bfloat16, torch.float16)):
        # CUDA's fused kernels take grouped heads in half precision only; the plain one keeps S x T weights.
        k_BTGK, v_BTGK = (t.repeat_interleave(shared, 2) for t in (k_BTGK, v_BTGK))
        grouped = False
    q_BHSK, k_BGTK, v_BGTK = (t.transpose(1, 2) for t in (q_BSHK, k_BTGK, v_BTGK))
    if soft_cap is not None:
        return _capped(q_BHSK, k_BGTK, v_BGTK, mask_ST, dropout, soft_cap).transpose(1, 2)
    y_BHSK = F.scaled_dot_product_attention(
        q_BHSK, k_BGTK, v_BGTK, attn_mask=mask_ST, dropout_p=dropout, is_causal=mask_ST is None, enable_gqa=grouped
    )
    return y_BHSK.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask_ST: Tensor | None, dropout: float, cap: float) -> Tensor:
    if mask_ST is None:
        mask_ST = seen_from(torch.arange(q.shape[2], device=q.device), k.shape[2])
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask_ST, -torch.inf)
    return F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v
