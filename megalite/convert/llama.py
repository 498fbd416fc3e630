"""Llama and its kin, Mistral and Qwen: config.json and tensor names."""

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.schema import ModelConfig
from megalite.convert.family import Family, Rule
from megalite.errors import ConfigError

_LENGTH = {"original_max_position_embeddings": "original_max_sequence_length"}
# rope_type -> its keys in config.json and ours.
SCALINGS = {
    "linear": {},
    "llama3": _LENGTH | {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"},
    "yarn": _LENGTH | {"beta_slow": "beta_slow", "beta_fast": "beta_fast"},
}
_YARN_SCALES = ("attention_factor", "mscale", "mscale_all_dim")  # ours has YaRN's own default


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    if bool(hf.get("attention_bias")) != bool(hf.get("mlp_bias")):
        raise ConfigError("config.json: attention_bias and mlp_bias differ; known: both or neither")
    return _read_unbiased(hf) | {"bias": bool(hf.get("mlp_bias"))}


def _read_unbiased(hf: Mapping[str, Any]) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    base, scaling = _read_rotary(hf)
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
        "rotary_base": base,
        "rotary_scaling": scaling,
        "bias": False,
        "tied_embeddings": hf.get("tie_word_embeddings", False),
        "init_std": hf.get("initializer_range", 0.02),
    }


def _read_rotary(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of those before it.

    Where a file has both they must say the same: versions differ in which one they take.
    """
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        if (rope := hf.get(key)) is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: {key} is {rope!r}; known: a mapping with rope_type")
        base = rope.get("rope_theta", hf.get("rope_theta"))
        found[key] = (10000.0 if base is None else float(base), _read_scaling(rope, hf))
    if len(set(map(repr, found.values()))) > 1:
        raise ConfigError("config.json: rope_parameters and rope_scaling say different things; keep the right one")
    base = hf.get("rope_theta")
    default = (10000.0 if base is None else float(base), None)
    return next(iter(found.values()), default)


def _read_scaling(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key, known in {"partial_rotary_factor": 1.0, "truncate": True, **dict.fromkeys(_YARN_SCALES)}.items():
        if (value := rope.get(key, known)) not in (known, None):
            raise ConfigError(f"config.json: {key} is {value!r}; known: {known!r}")
    if kind == "default":
        return None
    if kind not in SCALINGS:
        raise ConfigError(f"config.json: rope_type is {kind!r}; known: default, {', '.join(SCALINGS)}")
    values: dict[str, Any] = {"method": kind, "factor": float(rope["factor"])}
    for theirs, ours in SCALINGS[kind].items():
        if rope.get(theirs) is not None:
            values[ours] = rope[theirs]
    if kind != "linear" and "original_max_sequence_length" not in values:
        length = hf.get("original_max_position_embeddings")
        values["original_max_sequence_length"] = length or hf["max_position_embeddings"]
    return values


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := model.rotary_scaling:
        rope = {"rope_type": scaling.method, "factor": scaling.factor}
        rope |= {theirs: getattr(scaling, ours) for theirs, ours in SCALINGS[scaling.method].items()}
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
    return _read_unbiased(hf) | {"sliding_window": hf["sliding_window"]}


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    return _write_llama(model) | {"sliding_window": model.sliding_window}


def _read_qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _read_unbiased(hf) | {"qkv_bias": True}


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    return _write_llama(model) | {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False}


def _read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _read_unbiased(hf) | {"qk_norm": True}


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
