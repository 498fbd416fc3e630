"""One logical tensor of ours and the tensors of Hugging Face that it is fused from."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from megalite.config.schema import ModelConfig
from megalite.convert.family import Rule
from megalite.layers.shard import Shard, shard_of
from megalite.mesh import single_mesh
from megalite.models import build_model, named_logical_parameters

# Precision -> torch's type, the name in safetensors, bytes.
DTYPES = {"fp32": (torch.float32, "F32", 4), "bf16": (torch.bfloat16, "BF16", 2), "fp16": (torch.float16, "F16", 2)}
# What an import keeps of its source, for an export to give back: a folder of the run.
CARRIED = "hf"
INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
GENERATION = "generation_config.json"


def logical_shards(model: ModelConfig) -> dict[str, Shard]:
    """Logical shapes by name, in the order of the model."""
    meta = build_model(model, single_mesh(torch.device("cpu")))
    return {name: shard_of(parameter) for name, parameter in named_logical_parameters(meta)}


def stored_dtype(rule: Rule) -> str:
    """What an imported tensor is stored in: fp32; a distance from one in fp64, where it is exact down to 2^-29."""
    return "F64" if rule.from_one else "F32"


def from_part(rule: Rule, tensor: Tensor) -> Tensor:
    """Our values, in `stored_dtype`, of one of the tensors that a logical one is fused from."""
    if rule.from_one:
        return tensor.double() - 1
    return tensor.float().t() if rule.transposed else tensor.float()


def to_parts(rule: Rule, tensor: Tensor, shard: Shard) -> Iterator[Tensor]:
    """Their tensors of a logical one, in its precision."""
    tensor = tensor + 1 if rule.from_one else tensor
    pieces = tensor.split(list(shard.parts)) if len(rule.parts) > 1 else (tensor,)
    for piece in pieces:
        yield piece.t() if rule.transposed else piece


def part_shapes(rule: Rule, shard: Shard) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of their tensors of a logical one."""
    sizes = shard.parts if len(rule.parts) > 1 else (shard.shape[0],)
    for part, size in zip(rule.parts, sizes, strict=True):
        shape = (size, *shard.shape[1:])
        yield part, shape[::-1] if rule.transposed else shape


def planned_files(
    rules: Iterable[Rule], shards: Mapping[str, Shard], element_bytes: int, limit: int
) -> Iterator[list[Rule]]:
    """Rules file by file, of at most `limit` bytes or one larger tensor."""
    group: list[Rule] = []
    size = 0
    for rule in rules:
        num_bytes = element_bytes * torch.Size(shards[rule.name].shape).numel()
        if group and size + num_bytes > limit:
            yield group
            group, size = [], 0
        group.append(rule)
        size += num_bytes
    yield group


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row by row, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
