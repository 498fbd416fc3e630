"""Each layer on the GPU against the same layer on the CPU in float64, which other tests hold against plain torch."""

import pytest

from benchmarks.gpu import parity

pytestmark = pytest.mark.gpu
CASES = parity.layer_cases(parity.SIZES)


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_layer(name, dtype, device):
    assert parity.layer_error(CASES[name], parity.SIZES.V, dtype, device) <= parity.LAYER_TOLERANCE[dtype]


def test_dropout_masks_are_the_same_bits(device):
    assert parity.mask_error(device) == 0.0
