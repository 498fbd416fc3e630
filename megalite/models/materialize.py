"""The parameters of a model by their logical names, and their initial values.

A logical name is the module path with the global layer index: the same on every layout. The initial value of a
parameter is a function of (run seed, logical name) alone, so every layout starts from the same weights, and no rank
ever holds more than its shard and one whole tensor.
"""

import math
import mmap
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.layers.shard import init_of, replace_parameter, shard_of
from megalite.mesh import Mesh
from megalite.rng import fold


def named_logical_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(logical name, parameter) for every parameter, in the order of `model.named_parameters()`."""
    for name, module, attribute in iter_parameter_slots(model):
        yield name, getattr(module, attribute)


def iter_parameter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(logical name, module, attribute) for every parameter: where it lives, so that it can be replaced."""
    for path, module in model.named_modules():
        for attribute in list(module._parameters):
            if module._parameters[attribute] is not None:
                yield _logical_name(model, f"{path}.{attribute}" if path else attribute), module, attribute


def init_parameter(name: str, parameter: nn.Parameter, seed: int, mesh: Mesh) -> Tensor:
    """The initial values of this rank's part of the parameter with logical `name`: fp32, on the CPU.

    The whole logical tensor is drawn from a CPU generator, on every rank and whatever the device, then cut: the same
    weights for every layout. No more than that tensor and the cut are alive at once.
    """
    shard, init = shard_of(parameter), init_of(parameter)
    local = torch.zeros(shard.local_shape(mesh.tensor.size))
    if init.std == 0.0:
        return local
    full = local if tuple(local.shape) == shard.shape else _scratch(shard.shape)
    full.normal_(0.0, init.std, generator=torch.Generator().manual_seed(fold(seed, name)))
    if full is not local:
        shard.slice_into(local, full, mesh.tensor.rank, mesh.tensor.size)
    return local


def gather_parameter(local: Tensor, parameter: nn.Parameter, mesh: Mesh) -> Tensor:
    """The logical tensor of what each tensor rank holds of it (a weight, a gradient, a moment); on all of them."""
    shard, local = shard_of(parameter), local.contiguous()
    if shard.dim is None or mesh.tensor.size == 1:
        return shard.gather([local])
    pieces = [torch.empty_like(local) for _ in range(mesh.tensor.size)]
    dist.all_gather(pieces, local, group=mesh.tensor.group)
    return shard.gather(pieces)


def materialize(model: nn.Module, mesh: Mesh, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter storage on the mesh's device and its initial values, one parameter at a time."""
    for name, module, attribute in iter_parameter_slots(model):
        local = init_parameter(name, getattr(module, attribute), seed, mesh)
        replace_parameter(module, attribute, local.to(mesh.device, dtype))


def allocate(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> None:
    """Give every parameter storage on the mesh's device, zeros for now: an engine fills in the weights itself."""
    for _, module, attribute in iter_parameter_slots(model):
        shape = getattr(module, attribute).shape
        replace_parameter(module, attribute, torch.zeros(shape, dtype=dtype, device=mesh.device))


def _scratch(shape: tuple[int, ...]) -> Tensor:
    """An fp32 tensor in pages of its own, which go back to the system when it is dropped.

    On the heap each would leave a hole that the next one does not fit (glibc's aligned allocations ask for a little
    more than they keep), and a rank would end up with room for the whole model.
    """
    pages = mmap.mmap(-1, 4 * math.prod(shape))
    return torch.frombuffer(pages, dtype=torch.float32).view(shape)


def _logical_name(model: nn.Module, name: str) -> str:
    """`blocks.<index in this model>.` becomes `blocks.<index in the whole model>.`."""
    match = re.match(r"blocks\.(\d+)\.", name)
    if match is None:
        return name
    block = model.get_submodule(f"blocks.{match[1]}")
    return f"blocks.{block.layer}.{name[match.end() :]}"
