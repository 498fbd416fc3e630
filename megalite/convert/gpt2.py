"""GPT-2: config.json and tensor names."""

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.schema import ModelConfig
from megalite.convert.family import Family, Rule
from megalite.errors import ConfigError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


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


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: the activation is {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _read_gpt2,
    _write_gpt2,
    _gpt2_rules,
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)
