"""Llama and its kin, Mistral and Qwen: config.json and tensor names."""

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.schema import ModelConfig
from megalite.convert.family import Family, Rule
from megalite.errors import ConfigError


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    biases = {bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))}
    if len(biases) > 1:
        raise ConfigError("config.json: attention_bias and mlp_bias differ; known: both or neither")
    heads = hf["num_attention_heads"]
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    base = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    return {
        "vocab_size": hf["vocab_size"],
        "max_sequence_length": hf["max_position_embeddings"],
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_size": hf.get("head_dim") or hf["hidden_size"] // heads,
        "ffn_hidden_size": hf["intermediate_size"],
        "norm": "rmsnorm",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "positions": "rotary",
        "rotary_base": float(base),
        "rotary_scaling": _read_scaling(rope),
        "bias": biases.pop(),
        "tied_embeddings": hf.get("tie_word_embeddings", False),
        "init_std": hf.get("initializer_range", 0.02),
    }


def _read_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']!r}; known: 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(f"config.json: rope_type is {kind!r}; known: default, linear, llama3, yarn")
    if kind == "yarn" and {"attention_factor", "mscale", "mscale_all_dim"} & set(rope):
        raise ConfigError("config.json: YaRN with attention_factor or mscale; known: with its own default")
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_sequence_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "beta_slow": "beta_slow",
        "beta_fast": "beta_fast",
    }
    return {"method": kind} | {ours: rope[theirs] for theirs, ours in names.items() if rope.get(theirs) is not None}


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := model.rotary_scaling:
        rope = {"rope_type": scaling.method, "factor": scaling.factor}
        if scaling.method in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = scaling.original_max_sequence_length
        if scaling.method == "llama3":
            rope |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
        if scaling.method == "yarn":
            rope |= {"beta_slow": scaling.beta_slow, "beta_fast": scaling.beta_fast}
    return {
        "vocab_size": model.known_vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        # Under the names of transformers 5 and of those before it.
        "rope_parameters": rope | {"rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,
        "rope_scaling": rope if model.rotary_scaling else None,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "attention_dropout": model.dropout,
    }


def _read_mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _read_llama({**hf, "attention_bias": False, "mlp_bias": False}) | {
        "sliding_window": hf.get("sliding_window")
    }


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    return _write_llama(model) | {"sliding_window": model.sliding_window}


def _read_qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _read_llama({**hf, "attention_bias": False, "mlp_bias": False}) | {"qkv_bias": True}


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    return _write_llama(model) | {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False}


def _read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _read_qwen2(hf) | {"qkv_bias": None, "qk_norm": True}


def _llama_rules(model: ModelConfig) -> Iterator[Rule]:
    yield Rule("embedding.tokens.weight", ("model.embed_tokens.weight",))
    fused = {
        "attention.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "attention.output": ("self_attn.o_proj",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    }
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if model.qk_norm:
        norms |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for name, norm in norms.items():
            yield Rule(f"{ours}.{name}.weight_offset", (f"{theirs}.{norm}.weight",), from_one=True)
        for name, linears in fused.items():
            biased = model.has_qkv_bias if name == "attention.qkv" else model.bias
            for kind in ("weight", "bias") if biased else ("weight",):
                yield Rule(f"{ours}.{name}.{kind}", tuple(f"{theirs}.{linear}.{kind}" for linear in linears))
    yield Rule("head.norm.weight_offset", ("model.norm.weight",), from_one=True)
    if not model.tied_embeddings:
        yield Rule("head.output.weight", ("lm_head.weight",))


_SILU = {"hidden_act": "silu"}
_QWEN = _SILU | {"use_sliding_window": False}  # else it slides in some layers only
LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, _llama_rules, fixed=_SILU)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _read_mistral,
    _write_mistral,
    _llama_rules,
    fixed=_SILU,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _read_qwen2,
    _write_qwen,
    _llama_rules,
    fixed=_QWEN,
    defaults={"num_key_value_heads": 32},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _read_qwen3,
    _write_qwen,
    _llama_rules,
    fixed=_QWEN | {"attention_bias": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
