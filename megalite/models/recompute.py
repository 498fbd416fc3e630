"""Which activations a block keeps for its backward pass, and which it computes again.

| recompute | kept per block                                          | computed again                        |
|-----------|---------------------------------------------------------|---------------------------------------|
| none      | everything                                              | nothing                               |
| selective | outputs of matrix products, attention and collectives   | norms, activations, dropout, rotary   |
| full      | the block's input                                       | the block, its collectives too        |

Dropout comes out the same both times: the residual one is a function of its key, and the attention one draws from a
generator whose state torch.utils.checkpoint sets back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megalite.config.schema import Recompute

# Dear to compute or to communicate, for what they take in memory.
_KEPT = (
    ("aten", "mm"),
    ("aten", "addmm"),
    ("aten", "bmm"),
    ("aten", "_scaled_dot_product_flash_attention"),
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"),
    ("aten", "_scaled_dot_product_efficient_attention"),
    ("aten", "_scaled_dot_product_cudnn_attention"),
    ("_c10d_functional", "all_reduce"),
    ("_c10d_functional", "reduce_scatter_tensor"),
    ("megalite", "gathered_linear"),
    ("_c10d_functional", "wait_tensor"),
)
_KEPT_OPS = frozenset(getattr(getattr(torch.ops, namespace), name).default for namespace, name in _KEPT)


def run_block(function: Callable[..., Tensor], recompute: Recompute, uses_dropout: bool, *args: Any) -> Tensor:
    """`function(*args)`, keeping for the backward pass what `recompute` says."""
    match recompute:
        case "none":
            return function(*args)
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, _selective_policy)
            return checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=uses_dropout, context_fn=contexts
            )
        case "full":
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=uses_dropout)


def _selective_policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
