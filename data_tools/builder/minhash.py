"""MinHash signatures of documents, cut into bands: documents that share a band are candidates for near duplicates.

Two documents whose sets of word n-grams have Jaccard similarity s share a band of r rows with probability s^r, and one
of b bands with 1 - (1 - s^r)^b (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", ch. 3). With
21 bands of 6 rows that is 99.8% at s = 0.8 and 4% at s = 0.35; candidates are compared by their true similarity after.
"""

import numpy as np
from numpy.typing import NDArray

from megalite.errors import ConfigError

from .shingles import I64, U64, scatter

BANDS, ROWS = 21, 6
_PERMUTATIONS = 128  # a power of two is quicker; the last two are not used
_SEED = 1


def require_minhash() -> None:
    """Raise `ConfigError` when the library is not installed."""
    try:
        import rensa  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("dedup.near needs one more package: pip install megalite[data]") from None


def band_keys(hashes: U64, offsets: I64) -> NDArray[np.uint64]:
    """Keys [BANDS, documents] of documents with n-grams `hashes` [n-grams], beginning at `offsets` [documents + 1].

    A document without n-grams has keys of its own, which no other has.
    """
    from rensa import RMinHash

    documents = len(offsets) - 1
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), _PERMUTATIONS, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(documents, _PERMUTATIONS)
    keys = np.empty((BANDS, documents), np.uint64)
    for band in range(BANDS):
        key = np.full(documents, band, np.uint64)
        for row in range(ROWS):
            key = scatter(key ^ signatures[:, band * ROWS + row])
        keys[band] = key
    return keys
