"""Rotary and sinusoidal positions against their formulas."""

import pytest
import torch

from megalite.config.schema import ModelConfig, RotaryScalingConfig
from megalite.layers.positions import apply_rotary, rotary_tables, sinusoids
from tests.models.plain import plain_rotary, plain_sinusoids


def test_sinusoids():
    found = sinusoids(torch.arange(9), 12, torch.float64)
    torch.testing.assert_close(found, plain_sinusoids(9, 12, torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        # A short original context, so that all three branches (kept, ramp, slowed) are met with few frequencies.
        RotaryScalingConfig(factor=8.0, original_max_sequence_length=64),
    ],
)
def test_rotary(scaling):
    config = ModelConfig(hidden_size=64, num_attention_heads=2, rotary_scaling=scaling)
    x = torch.randn(2, 50, 2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tables = rotary_tables(torch.arange(50), 32, config.rotary_base, scaling, x.dtype)
    torch.testing.assert_close(apply_rotary(x, *tables), plain_rotary(x, config), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("yarn", {"original_max_position_embeddings": 512}),
        ("llama3", {"original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
@pytest.mark.parametrize(("size", "base", "factor"), [(128, 10000.0, 4.0), (64, 500000.0, 40.0)])
def test_scalings_are_those_of_transformers(method, parameters, size, base, factor):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {"rope_type": method, "rope_theta": base, "factor": factor} | parameters
    config = LlamaConfig(head_dim=size, max_position_embeddings=int(512 * factor), rope_parameters=parameters)
    wanted, scale = rope.ROPE_INIT_FUNCTIONS[method](config, "cpu")
    scaling = RotaryScalingConfig(method=method, factor=factor, original_max_sequence_length=512)
    cos, sin = rotary_tables(torch.arange(2), size, base, scaling, torch.float64)
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), wanted.double(), atol=1e-6, rtol=1e-5)
    assert torch.hypot(sin[1], cos[1])[0].item() == pytest.approx(scale)


def test_ntk_slows_the_slowest_rotation_by_the_factor_and_keeps_the_fastest():
    plain, _ = rotary_tables(torch.arange(2), 64, 10000.0, None, torch.float64)
    scaling = RotaryScalingConfig(method="ntk", factor=4.0)
    scaled, _ = rotary_tables(torch.arange(2), 64, 10000.0, scaling, torch.float64)
    ratio = plain[1].acos() / scaled[1].acos()
    assert ratio[0].item() == pytest.approx(1)
    assert ratio[-1].item() == pytest.approx(4)
    assert torch.all(ratio.diff() > 0)


def test_scaling_changes_the_slow_rotations_only():
    plain, _ = rotary_tables(torch.arange(4096), 64, 500000.0, None, torch.float64)
    scaled, _ = rotary_tables(torch.arange(4096), 64, 500000.0, RotaryScalingConfig(), torch.float64)
    assert torch.equal(plain[:, 0], scaled[:, 0])
    assert not torch.allclose(plain[:, -1], scaled[:, -1])


def test_far_positions_keep_their_precision():
    position = 120_001
    cos, sin = rotary_tables(torch.tensor([position]), 64, 500000.0, None, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    exact = torch.polar(torch.ones(32, dtype=torch.float64), position * 500000.0 ** -(torch.arange(32).double() / 32))
    torch.testing.assert_close(cos[0].double(), exact.real, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0].double(), exact.imag, atol=1e-6, rtol=0)


def test_half_precision_is_rotated_in_fp32():
    x = torch.randn(1, 8, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_tables(torch.arange(8), 32, 10000.0, None, torch.bfloat16)
    found = apply_rotary(x, *tables)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, apply_rotary(x.float(), *tables).bfloat16())
