"""What a model family of Hugging Face is to us: its config.json as our keys and back, and what its tensors are called.

Our layout: query, key and value projections fused in that order, gate and up projections fused in that order, matrices
as (outputs, inputs), norm weights as their distance from one. Rotary embeddings use the same two halves as
transformers, so no head is permuted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalite.config.schema import ModelConfig


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
    fixed: Mapping[str, Any] = field(default_factory=dict)  # keys that change numbers, at the one value that we have
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes where a file says nothing
