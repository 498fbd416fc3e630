"""Random numbers without random state: every stream is a pure function of (seed, step, micro batch, role, place).

Nothing is saved in a checkpoint, nothing is swapped in and out inside a compiled block, and the same layout repeats bit
for bit. Three kinds:

- `fold`, on the host: mixes values into one 64-bit seed (initial weights, data order, the two below);
- `dropout`, on the device: a counter-based hash of (key, position of the element) decides what is dropped. The key does
  not know the tensor rank, so replicated activations are dropped alike on every tensor rank. The backward pass hashes
  again instead of storing a mask;
- attention dropout lives inside the fused attention kernel, which draws from torch's default generator:
  `seed_attention_stream` sets it for each micro batch, differently on each tensor rank (they hold different heads).

Legend: K key words (2), R rows (all dims but the last), C columns (the last dim).
"""

import hashlib
from typing import Any

import torch
from torch import Tensor

KEY_WORDS = 2


def fold(*values: int | str) -> int:
    """Mix integers and strings into one integer in [0, 2**64): the same on every machine and in every version.

    BLAKE2b with an 8-byte digest over the values, each written as its kind, its length and its decimal or UTF-8 bytes,
    so that ("ab", "c") and ("a", "bc"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        data = str(value).encode()
        digest.update(b"%c%d:" % (b"s" if isinstance(value, str) else b"i", len(data)))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def micro_batch_key(seed: int, step: int, micro_batch: int, data_rank: int, device: torch.device) -> Tensor:
    """The dropout key of one micro batch on one replica: int32, shape (2,), made on `device` without a host sync."""
    bits = fold(seed, step, micro_batch, "dropout", data_rank)
    words = [_signed32(bits & 0xFFFFFFFF), _signed32(bits >> 32)]
    # `full` passes its value as a kernel argument; `torch.tensor(words, device=...)` would copy and wait.
    return torch.stack([torch.full((), word, dtype=torch.int32, device=device) for word in words])


def seed_attention_stream(seed: int, step: int, micro_batch: int, data_rank: int, tensor_rank: int) -> None:
    """Seed torch's default generators for the attention dropout of one micro batch; call before its forward pass.

    Recomputation in the backward pass restores the state by itself (torch.utils.checkpoint).
    """
    torch.manual_seed(fold(seed, step, micro_batch, "attention", data_rank, tensor_rank))


def derive(key_K: Tensor, stream: int | Tensor) -> Tensor:
    """An independent key for each stream: (2,) and an int give (2,); an int32 tensor of shape (N,) gives (N, 2)."""
    first, second = key_K[0], key_K[1]
    first = _mix(_mix(first ^ stream) ^ second)
    second = _mix(_mix(second ^ stream) ^ first)
    return torch.stack([first, second], dim=-1)


def dropout(x: Tensor, p: float, key_K: Tensor) -> Tensor:
    """Drop each element with probability `p`, scale the rest by 1 / (1 - p).

    What is dropped depends on `key_K` and on the element's row and column alone (rows: all dims but the last,
    flattened). `p` in [0, 1). The gradient is dropped and scaled alike.
    """
    assert 0.0 <= p < 1.0, f"dropout probability {p} is outside [0, 1)"
    return x if p == 0.0 else _Dropout.apply(x, p, key_K)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key_K: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(key_K)
        return _drop(x, p, key_K)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (key_K,) = ctx.saved_tensors
        return _drop(grad, ctx.p, key_K), None, None


def _drop(x: Tensor, p: float, key_K: Tensor) -> Tensor:
    keep_RC = keep_mask(x.numel() // x.shape[-1], x.shape[-1], p, key_K)
    return torch.where(keep_RC.view(x.shape), x * (1.0 / (1.0 - p)), 0.0)


def keep_mask(num_rows: int, num_columns: int, p: float, key_K: Tensor) -> Tensor:
    """True where an element stays, (R, C): mix(mix(row ^ key[0]) ^ mix(column ^ key[1])) against a threshold."""
    rows_R = torch.arange(num_rows, dtype=torch.int32, device=key_K.device)
    columns_C = torch.arange(num_columns, dtype=torch.int32, device=key_K.device)
    bits_RC = _mix(_mix(rows_R ^ key_K[0])[:, None] ^ _mix(columns_C ^ key_K[1])[None, :])
    return bits_RC >= int(p * 2**32) - 2**31  # int32 runs from -2^31, with a share p of it below


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that looks random: `lowbias32` of Chris Wellons.

    https://nullprogram.com/blog/2018/07/31/. On int32, whose products wrap and whose right shift copies the sign bit
    (hence the masks).
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
