"""Attention over sequences that several ranks share: each holds S / c of a sequence's tokens (the context axis).

| method  | holds of a sequence         | sends                                   | allows                            |
|---------|-----------------------------|-----------------------------------------|-----------------------------------|
| ulysses | one run of S / c tokens     | q, k, v and the result once, all to all | c that divides the local kv heads |
| ring    | two runs of S / 2c (zigzag) | k and v to the next rank, c - 1 times   | any c                             |

Ulysses (Jacobs et al. 2023): every rank gets all tokens of 1 / c of the heads, attends as if alone, and gives the
result back. Ring (Liu et al. 2023): a rank's queries meet the keys and values of all ranks, one rank's at a time. The
zigzag order gives every rank an early and a late run of the sequence, so that all have the same share of the causal
triangle (Brandon et al. 2023 for the imbalance; zigzag as in ring-flash-attention).

Legend: B batch, S tokens held here, H query heads, G key and value heads, K head size; `_local` is of the tensor axis.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite import comm
from megalite.config.schema import ContextMethod
from megalite.layers.attention_block import block_backward, block_forward
from megalite.mesh import Axis

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_BSHK, k_BSGK, v_BSGK -> y_BSHK, causal


@dataclass(frozen=True)
class Context:
    """How sequences are shared: the context axis of the mesh and the method."""

    axis: Axis
    method: ContextMethod  # resolved: not auto

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Which of a sequence's `length` tokens this rank holds, int64, ascending; `length` divides evenly."""
        size, rank = self.axis.size, self.axis.rank
        if self.method == "ulysses":
            part = length // size
            return torch.arange(rank * part, (rank + 1) * part, device=device)
        part = length // (2 * size)
        early = torch.arange(rank * part, (rank + 1) * part, device=device)
        return torch.cat([early, early + (2 * size - 1 - 2 * rank) * part])

    def attend(
        self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, alone: Attend, mask: Tensor | None = None
    ) -> Tensor:
        """Causal attention over whole sequences: (B, S, H, K). `alone`: the same for one rank that holds them all.

        `mask`: which tokens of whole sequences see which, (B, 1, T, T); `alone` knows it too. None: all before them.
        """
        if self.method == "ulysses":
            return _ulysses(q_BSHK, k_BSGK, v_BSGK, alone, self.axis)
        return _Ring.apply(q_BSHK, k_BSGK, v_BSGK, self, mask)


def _ulysses(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, alone: Attend, axis: Axis) -> Tensor:
    # Side by side, rank by rank, so that one exchange carries all three.
    parts = [x.unflatten(2, (axis.size, -1)) for x in (q_BSHK, k_BSGK, v_BSGK)]
    heads = [part.shape[3] for part in parts]
    whole = comm.exchange(torch.cat(parts, dim=3).flatten(2, 3), axis, split=2, join=1)
    y = alone(*whole.split(heads, dim=2))
    return comm.exchange(y, axis, split=1, join=2)


class _Ring(torch.autograd.Function):
    """Blocks of attention, each normalised by itself, merged by their log-sum-exp; the same blocks again backwards.

    Between the blocks k and v, and backwards their gradients too, go to the next rank while this one computes.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, context: Context, mask: Tensor | None
    ) -> Tensor:
        axis = context.axis
        q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        log_sum = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        for step, kv in _round(torch.stack([k, v]), axis):
            rows, columns = _visible(step, axis, q.shape[2])
            keys, values = kv[:, :, :, columns].unbind()
            seen = _seen(mask, context, step, q.shape[2], rows, columns)
            y, y_log_sum = block_forward(q[:, :, rows], keys, values, step == 0, seen)
            merged = torch.logaddexp(log_sum[:, :, rows], y_log_sum.to(wide))
            out[:, :, rows] *= (log_sum[:, :, rows] - merged).exp()[..., None]
            out[:, :, rows] += y * (y_log_sum - merged).exp()[..., None]
            log_sum[:, :, rows] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.context, ctx.mask = context, mask
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BSHK: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, log_sum = ctx.saved_tensors
        axis, grad = ctx.context.axis, grad_BSHK.transpose(1, 2)
        grad_q = torch.zeros(q.shape, dtype=log_sum.dtype, device=q.device)
        grad_kv = torch.zeros((2, *k.shape), dtype=log_sum.dtype, device=q.device)
        for step, kv in _round(torch.stack([k, v]), axis):
            rows, columns = _visible(step, axis, q.shape[2])
            keys, values = kv[:, :, :, columns].unbind()
            of_rows, q_rows, out_rows, log_sum_rows = (x[:, :, rows] for x in (grad, q, out, log_sum))
            seen = _seen(ctx.mask, ctx.context, step, q.shape[2], rows, columns)
            saved = (of_rows, q_rows, out_rows, log_sum_rows, keys, values)
            found_q, *found_kv = block_backward(*saved, step == 0, seen)
            grad_q[:, :, rows] += found_q
            grad_kv[:, :, :, columns] += torch.stack(found_kv)
            # It goes on with the keys and values that it belongs to, and after `size` steps is at home.
            grad_kv = _Shift(grad_kv, axis).wait()
        grad_k, grad_v = grad_kv.to(q.dtype)
        return grad_q.to(q.dtype).transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), None, None


def _round(kv: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """Every rank's `kv`, this rank's first, then that of the rank before it, and so on, with the number of the step.

    The next one is on its way while the caller computes with this one.
    """
    for step in range(axis.size):
        arriving = _Shift(kv, axis) if step + 1 < axis.size else None
        yield step, kv
        if arriving:
            kv = arriving.wait()


def _visible(step: int, axis: Axis, length: int) -> tuple[slice, slice]:
    """Which queries of this rank meet which keys of the rank that is `step` before it."""
    everything, half = slice(0, length), length // 2
    if step == 0:
        return everything, everything  # the causal mask of the two runs side by side
    if step <= axis.rank:  # from a lower rank: its early run lies before both of ours, its late run behind
        return everything, slice(0, half)
    return slice(half, length), everything  # from a higher rank: only our late run lies behind its two


def _seen(mask: Tensor | None, context: Context, step: int, length: int, rows: slice, columns: slice) -> Tensor | None:
    """Of the mask of whole sequences what is about our `rows` and the `columns` of the rank `step` before us."""
    if mask is None:
        return None
    source = (context.axis.rank - step) % context.axis.size
    theirs = Context(dataclasses.replace(context.axis, rank=source), context.method)
    whole = length * context.axis.size
    ours_S, theirs_T = (c.positions(whole, mask.device) for c in (context, theirs))
    return mask[:, :, ours_S[rows], :][..., theirs_T[columns]]


class _Shift:
    """A tensor on its way to the next rank of the axis, and the one from the rank before."""

    def __init__(self, x: Tensor, axis: Axis):
        ranks = dist.get_process_group_ranks(axis.group)
        following, preceding = ranks[(axis.rank + 1) % axis.size], ranks[axis.rank - 1]
        self._sent, self._received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        sending = dist.P2POp(dist.isend, self._sent, following, axis.group)
        receiving = dist.P2POp(dist.irecv, self._received, preceding, axis.group)
        self._works = dist.batch_isend_irecv([sending, receiving])

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received
