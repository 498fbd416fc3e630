"""Small models of both families, divisible by four tensor ranks."""

import dataclasses

from megalite.config.schema import ModelConfig, RotaryScalingConfig

GPT = ModelConfig(
    vocab_size=300,
    max_sequence_length=16,
    num_layers=2,
    hidden_size=24,
    num_attention_heads=8,
    head_size=4,
    ffn_hidden_size=48,
    activation="gelu_tanh",
)
LLAMA = ModelConfig(
    vocab_size=300,
    max_sequence_length=16,
    num_layers=2,
    hidden_size=24,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_size=4,
    ffn_hidden_size=40,
    norm="rmsnorm",
    activation="swiglu",
    positions="rotary",
    rotary_scaling=RotaryScalingConfig(original_max_sequence_length=8),
    bias=False,
    tied_embeddings=False,
)
MIXED = ModelConfig(
    vocab_size=200,
    max_sequence_length=16,
    num_layers=2,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    norm="rmsnorm",
    activation="relu_squared",
    positions="sinusoidal",
    bias=True,
    tied_embeddings=True,
)
YARN = RotaryScalingConfig(method="yarn", original_max_sequence_length=8)
QWEN = dataclasses.replace(LLAMA, qk_norm=True, qkv_bias=True, rotary_scaling=YARN)
GEMMA = dataclasses.replace(LLAMA, attention_soft_cap=0.5, logit_soft_cap=0.3, sliding_window=4, tied_embeddings=True)
NEOX = dataclasses.replace(GPT, parallel_residual=True, positions="none", sliding_window=1)
CONFIGS = {"gpt": GPT, "llama": LLAMA, "mixed": MIXED, "qwen": QWEN, "gemma": GEMMA, "neox": NEOX}
