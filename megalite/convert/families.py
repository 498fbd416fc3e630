"""The model families of Hugging Face that we read and write."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megalite.config.loader import load_config
from megalite.config.schema import ModelConfig
from megalite.convert.family import Family
from megalite.convert.gpt2 import GPT2
from megalite.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from megalite.errors import ConfigError

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)
# Of every family: what changes the numbers or the tensors of a model and is not ours.
_FIXED = {"quantization_config": None, "partial_rotary_factor": 1.0}


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
    family = family_of(hf_config)
    for key, value in {**_FIXED, **family.fixed}.items():
        if (found := hf_config.get(key, value)) != value:
            raise ConfigError(f"config.json: {key} is {found!r}; known: {value!r}")
    try:
        return load_config(ModelConfig, family.read({**family.defaults, **hf_config}), "model")
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
