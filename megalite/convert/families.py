"""The model families of Hugging Face: their config.json as our keys and back, and what their tensors are called.

Our layout: query, key and value projections fused in that order, gate and up projections fused in that order, matrices
as (outputs, inputs), norm weights as their distance from one. Rotary embeddings use the same two halves as
transformers, so no head is permuted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.loader import load_config
from megalite.config.schema import ModelConfig
from megalite.errors import ConfigError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Rule:
    """One logical tensor and what it is made of: `parts`, fused along dim 0 in this order."""

    name: str
    parts: tuple[str, ...]
    transposed: bool = False  # theirs is (inputs, outputs)
    from_one: bool = False  # ours is the distance from one


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers maps to a `ModelConfig`."""

    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> our keys
    write: Callable[[ModelConfig], dict[str, Any]]  # -> keys of config.json
    rules: Callable[[ModelConfig], Iterator[Rule]]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises `ConfigError` when it is none of `FAMILIES`."""
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(f"config.json: model_type is {model_type!r}; known: {known}")


def read_model(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes. Raises `ConfigError` for one that we do not have."""
    try:
        return load_config(ModelConfig, family_of(hf_config).read(hf_config), "model")
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from None


def family_for(model: ModelConfig) -> Family:
    """The first family that describes `model` without loss: its config.json, read back, gives `model` again.

    Raises `ConfigError` that names, for the nearest family, the keys that have no place there.
    """
    closest: tuple[str, list[str]] | None = None
    for family in FAMILIES:
        again = read_model({"model_type": family.model_type, **family.write(model)})
        differing = [key for key, value in _explicit(model).items() if _explicit(again)[key] != value]
        if not differing:
            return family
        if closest is None or len(differing) < len(closest[1]):
            closest = (family.model_type, differing)
    assert closest is not None
    name, differing = closest
    raise ConfigError(
        f"no model of transformers is this one; the nearest, {name}, differs in "
        + ", ".join(f"model.{key}" for key in differing)
    )


def _explicit(model: ModelConfig) -> dict[str, Any]:
    """Every key that tells models apart, defaults filled in."""
    values = dataclasses.asdict(model) | {
        "num_key_value_heads": model.num_kv_heads,
        "head_size": model.head_dim,
        "ffn_hidden_size": model.ffn_size,
        "qkv_bias": model.has_qkv_bias,
    }
    values.pop("dropout")  # of training alone
    if model.positions != "rotary":
        values["rotary_base"] = None
    return values


# GPT-2 ---------------------------------------------------------------------------------------------------------------


def _read_gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": hf["vocab_size"],
        "max_sequence_length": hf["n_positions"],
        "num_layers": hf["n_layer"],
        "hidden_size": hf["n_embd"],
        "num_attention_heads": hf["n_head"],
        "ffn_hidden_size": hf.get("n_inner") or 4 * hf["n_embd"],
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(hf.get("activation_function", "gelu_new")),
        "tied_embeddings": hf.get("tie_word_embeddings", True),
        "init_std": hf.get("initializer_range", 0.02),
    }


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    activation = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == model.activation), "gelu_new")
    return {
        "vocab_size": model.known_vocab_size,
        "n_positions": model.max_sequence_length,
        "n_ctx": model.max_sequence_length,
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": activation,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "attn_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }


def _gpt2_rules(model: ModelConfig) -> Iterator[Rule]:
    yield Rule("embedding.tokens.weight", ("transformer.wte.weight",))
    yield Rule("embedding.positions.weight", ("transformer.wpe.weight",))
    linears = {"attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    linears["mlp.down"] = "mlp.c_proj"
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for name, norm in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            yield Rule(f"{ours}.{name}.weight_offset", (f"{theirs}.{norm}.weight",), from_one=True)
            yield Rule(f"{ours}.{name}.bias", (f"{theirs}.{norm}.bias",))
        for name, linear in linears.items():
            yield Rule(f"{ours}.{name}.weight", (f"{theirs}.{linear}.weight",), transposed=True)  # `Conv1D`
            yield Rule(f"{ours}.{name}.bias", (f"{theirs}.{linear}.bias",))
    yield Rule("head.norm.weight_offset", ("transformer.ln_f.weight",), from_one=True)
    yield Rule("head.norm.bias", ("transformer.ln_f.bias",))
    if not model.tied_embeddings:
        yield Rule("head.output.weight", ("lm_head.weight",))


# Llama and its kin ---------------------------------------------------------------------------------------------------


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act is {hf['hidden_act']!r}; known: silu")
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
    if hf.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window slides in some layers only; known: false")
    return _read_llama({**hf, "attention_bias": False, "mlp_bias": False}) | {"qkv_bias": True}


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    return _write_llama(model) | {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False}


def _read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("attention_bias"):
        raise ConfigError("config.json: attention_bias is true; known: false")
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


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: the activation is {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


FAMILIES = (
    Family("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, _gpt2_rules),
    Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, _llama_rules),
    Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, _llama_rules),
    Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen, _llama_rules),
    Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen, _llama_rules),
)
