"""Weights of transformers' models as MegaLite's logical tensors.

Our layout: query, key and value projections fused in that order, gate and up projections fused in that order, matrices
as (outputs, inputs). Rotary embeddings use the same two halves as transformers, so no head is permuted.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.errors import CheckpointError
from megalite.layers.shard import shard_of
from megalite.mesh import Mesh
from megalite.models.materialize import named_logical_parameters

# Buffers that old GPT-2 files carry beside the weights: the causal mask, and the rotary frequencies of old Llama files.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def from_huggingface(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a GPT-2 or a Llama of transformers, as {logical name: full tensor}.

    `config` describes the same model (layers, tied embeddings, biases). Raises `CheckpointError` if it is neither
    family, if a tensor is missing, or if one is left over.
    """
    source = {name.removeprefix("transformer."): tensor for name, tensor in state_dict.items()}
    source = {name: tensor for name, tensor in source.items() if not name.endswith(_BUFFERS)}
    if "wte.weight" in source:
        taken = _Taker(source)
        tensors = _from_gpt2(taken, config)
    elif "model.embed_tokens.weight" in source:
        taken = _Taker(source)
        tensors = _from_llama(taken, config)
    else:
        raise CheckpointError(
            "the weights are neither a GPT-2 (no wte.weight) nor a Llama (no model.embed_tokens.weight): they "
            f"begin with {', '.join(list(source)[:3]) or 'nothing'}. Other families are not supported."
        )
    if config.tied_embeddings:
        taken.drop("lm_head.weight")  # transformers saves the tied head under its own name in some versions
    else:
        tensors["head.output.weight"] = taken("lm_head.weight")
    taken.check_all_taken()
    return tensors


def load_logical(model: nn.Module, mesh: Mesh, tensors: Mapping[str, Tensor]) -> None:
    """Copy full logical tensors into a materialised model, each rank its slice.

    Raises `CheckpointError` if a tensor is missing, left over, or of another shape than the model's.
    """
    parameters = dict(named_logical_parameters(model))
    _check_names(parameters, tensors)
    for name, parameter in parameters.items():
        shard = shard_of(parameter)
        if tuple(tensors[name].shape) != shard.shape:
            raise CheckpointError(
                f"{name}: the weights have shape {tuple(tensors[name].shape)}, the model has {shard.shape}. "
                "Make the keys of `model` describe the weights."
            )
        local = shard.slice(tensors[name], mesh.tensor.rank, mesh.tensor.size)
        with torch.no_grad():
            parameter.copy_(local)


class _Taker:
    """Hands tensors out by name and remembers which were taken."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self._left = dict(source)

    def __call__(self, name: str) -> Tensor:
        try:
            return self._left.pop(name)
        except KeyError:
            raise CheckpointError(
                f"the weights lack {name}. Make the keys of `model` (num_layers, bias, tied_embeddings) describe them."
            ) from None

    def drop(self, name: str) -> None:
        """Ignore `name` if it is there."""
        self._left.pop(name, None)

    def check_all_taken(self) -> None:
        """Raise if a tensor was not used: a model with a part missing is not that model."""
        if self._left:
            raise CheckpointError(
                f"{len(self._left)} tensors of the weights have no place in the model, first {sorted(self._left)[0]}. "
                "Make the keys of `model` (num_layers, bias, tied_embeddings) describe them."
            )


def _from_gpt2(take: _Taker, config: ModelConfig) -> dict[str, Tensor]:
    tensors = {
        "embedding.tokens.weight": take("wte.weight"),
        "embedding.positions.weight": take("wpe.weight"),
        "head.norm.weight_offset": take("ln_f.weight") - 1,
        "head.norm.bias": take("ln_f.bias"),
    }
    linears = {"attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    linears["mlp.down"] = "mlp.c_proj"
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    for layer in range(config.num_layers):
        for ours, theirs in (linears | norms).items():
            weight = take(f"h.{layer}.{theirs}.weight")
            if ours in linears:
                tensors[f"blocks.{layer}.{ours}.weight"] = weight.t()  # `Conv1D`: (inputs, outputs)
            else:
                tensors[f"blocks.{layer}.{ours}.weight_offset"] = weight - 1
            tensors[f"blocks.{layer}.{ours}.bias"] = take(f"h.{layer}.{theirs}.bias")
    return tensors


def _from_llama(take: _Taker, config: ModelConfig) -> dict[str, Tensor]:
    tensors = {
        "embedding.tokens.weight": take("model.embed_tokens.weight"),
        "head.norm.weight_offset": take("model.norm.weight") - 1,
    }
    fused = {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": ("self_attn.o_proj",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    }
    kinds = ("weight", "bias") if config.bias else ("weight",)
    for layer in range(config.num_layers):
        for ours, theirs in fused.items():
            for kind in kinds:
                parts = [take(f"model.layers.{layer}.{part}.{kind}") for part in theirs]
                tensors[f"blocks.{layer}.{ours}.{kind}"] = torch.cat(parts)
        for ours, theirs_norm in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            offset = take(f"model.layers.{layer}.{theirs_norm}.weight") - 1
            tensors[f"blocks.{layer}.{ours}.weight_offset"] = offset
    return tensors


def _check_names(wanted: Iterable[str], found: Iterable[str]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"the weights do not match the model: {len(missing)} missing{_first(missing)}, {len(extra)} left over"
            f"{_first(extra)}. Make the keys of `model` describe the weights."
        )


def _first(names: list[str]) -> str:
    return f" (first {names[0]})" if names else ""
