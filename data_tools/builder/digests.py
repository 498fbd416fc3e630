"""128-bit hashes of what may stand more than once, a share of their values at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_share(keys: NDArray[np.uint64], share: int, shares: int) -> NDArray[np.bool_]:
    """Which keys belong to one of `shares` parts of their values."""
    return keys % np.uint64(shares) == np.uint64(share)


def sorted_by_digest(digests: NDArray[np.uint64], numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """`numbers` [n], those of equal `digests` [n, 2] side by side and rising; and [n - 1]: equal to the one before."""
    low, high = digests[:, 0], digests[:, 1]
    order = np.lexsort((numbers, high, low))
    same = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    return numbers[order], same
