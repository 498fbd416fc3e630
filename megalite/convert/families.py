"""The model families of Hugging Face that we read and write."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.loader import load_config
from megalite.config.schema import ModelConfig, RotaryScalingConfig
from megalite.convert.family import Family
from megalite.convert.gpt2 import GPT2
from megalite.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3, SCALINGS
from megalite.errors import ConfigError
from megalite.layers.positions import ntk_base
from megalite.log import get_logger

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)
# Of every family: what changes the numbers or the tensors of a model and is not ours.
_FIXED = {"quantization_config": None, "partial_rotary_factor": 1.0, "is_causal": True, "is_encoder_decoder": False,
          "add_cross_attention": False}  # fmt: skip
# Of every family: what changes no logits. What is neither read nor here is said.
_WITHOUT_EFFECT = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "attn_pdrop", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id",
    "finetuning_task", "gradient_checkpointing", "id2label", "initializer_range", "label2id", "max_window_layers",
    "model_type", "n_ctx", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "sliding_window",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "use_bfloat16", "use_cache",
))  # fmt: skip

log = get_logger(__name__)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises `ConfigError` when it is none of `FAMILIES`."""
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(f"config.json: model_type is {model_type!r}; known: {known}")


def read_model(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes; keys that are not known are logged.

    Raises `ConfigError` for one that we do not have, and for a file that makes no sense.
    """
    if not isinstance(hf_config, Mapping):
        raise ConfigError(f"config.json: expected a mapping of keys, found a {type(hf_config).__name__}")
    family = family_of(hf_config)
    fixed = {**_FIXED, **family.fixed}
    for key, value in fixed.items():
        if (found := hf_config.get(key, value)) != value:
            raise ConfigError(f"config.json: {key} is {found!r}; known: {value!r}")
    if others := set(hf_config.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(
            f"config.json: layer_types holds {', '.join(map(repr, sorted(others)))}; known: full_attention"
        )
    keys = _Recorded({**family.defaults, **hf_config})
    try:
        model = load_config(ModelConfig, family.read(keys), "model")
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json describes no model: {error}") from None
    if unknown := sorted(hf_config.keys() - keys.read - fixed.keys() - _WITHOUT_EFFECT - {"layer_types"}):
        log.warning("config.json: not used, though they may matter: %s", ", ".join(unknown))
    return model


class _Recorded(Mapping[str, Any]):
    """Keys and values; remembers which were asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def plain(model: ModelConfig) -> ModelConfig:
    """The same model with one spelling of its rotary scaling.

    `ntk` is a larger base, and what a method does not use has its default.
    """
    scaling = model.rotary_scaling
    if scaling is None or model.positions != "rotary":
        return dataclasses.replace(model, rotary_scaling=None)
    if scaling.method == "ntk":
        return dataclasses.replace(
            model, rotary_base=ntk_base(model.rotary_base, scaling.factor, model.head_dim), rotary_scaling=None
        )
    kept = {key: getattr(scaling, key) for key in ("method", "factor", *SCALINGS[scaling.method].values())}
    return dataclasses.replace(model, rotary_scaling=RotaryScalingConfig(**kept))


def family_for(model: ModelConfig) -> Family:
    """The first family that describes a `plain` model without loss: its config.json, read back, gives `model` again.

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
