"""Run a layer on real tensor ranks in float64; hold outputs and every gradient against plain torch on whole tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite import comm
from megalite.config.schema import ParallelConfig
from megalite.layers.shard import Shard, replace_parameter, shard_of
from megalite.mesh import Axis, build_mesh
from megalite.models.materialize import iter_parameter_slots
from tests.ranks import run_ranks

TOLERANCE = 1e-10
Tensors = dict[str, Tensor]


@dataclass
class Outcome:
    """What came out: on one rank, or (without shards) of the reference."""

    output: Tensor
    input_grads: list[Tensor | None]
    weight_grads: Tensors
    shards: dict[str, Shard]


def random_tensors(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def shapes_of(make: Callable[[Axis], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Logical shapes of a layer's parameters."""
    layer = make(Axis("tensor", 1, 0, None))
    return {name: shard_of(getattr(module, attribute)).shape for name, module, attribute in iter_parameter_slots(layer)}


def check_layer(
    tensor: int,
    make: Callable[[Axis], nn.Module],
    call: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    *inputs: Tensor,
    plant: Callable[[], None] = lambda: None,
    sequence: bool = False,
) -> None:
    """`call(layer, axis, *inputs)` on every rank against `plain(weights, *inputs)`; AssertionError if they differ.

    Both are followed by a backward pass from the same random gradient. `plant` runs on every rank before. `sequence`:
    between split layers ranks hold parts of the sequence.
    """
    weights = {name: 0.3 * t for name, t in random_tensors(0, **shapes_of(make)).items()}
    reference = _reference(weights, plain, inputs)
    ranks = run_ranks(
        tensor, _on_rank, ParallelConfig(tensor=tensor, sequence=sequence), make, call, weights, inputs, plant
    )
    compare(reference, ranks)


def on_parts(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` with its only input, x_BSD, and its output in parts of the sequence, for `check_layer(sequence=True)`."""
    return lambda layer, axis, x_BSD: comm.gather(call(layer, axis, comm.scatter(x_BSD, axis, 1)), axis, 1)


def compare(reference: Outcome, ranks: list[Outcome]) -> None:
    """Every output, every input's gradient and every replicated gradient on every rank; split ones put together."""
    for rank, outcome in enumerate(ranks):
        _close(outcome.output, reference.output, f"output on rank {rank}")
        for i, (found, wanted) in enumerate(zip(outcome.input_grads, reference.input_grads, strict=True)):
            if wanted is not None:
                assert found is not None, f"input {i} has no gradient"
                _close(found, wanted, f"gradient of input {i} on rank {rank}")
    assert reference.weight_grads.keys() == ranks[0].weight_grads.keys()
    for name, wanted in reference.weight_grads.items():
        shard = ranks[0].shards[name]
        if shard.dim is None:
            for rank, outcome in enumerate(ranks):
                _close(outcome.weight_grads[name], wanted, f"gradient of {name} on rank {rank}")
        else:
            _close(shard.gather([outcome.weight_grads[name] for outcome in ranks]), wanted, f"gradient of {name}")


def load_weights(layer: nn.Module, weights: Tensors, axis: Axis) -> None:
    for name, module, attribute in iter_parameter_slots(layer):
        shard = shard_of(getattr(module, attribute))
        replace_parameter(module, attribute, shard.slice(weights[name], axis.rank, axis.size).clone())


def _close(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.shape == wanted.shape, f"{what}: {found.shape} instead of {wanted.shape}"
    worst = (found - wanted).abs().max().item()
    assert worst <= TOLERANCE, f"{what} differs by {worst:.2e}"


def _reference(weights: Tensors, plain: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Outcome:
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    leaves = [_leaf(tensor) for tensor in inputs]
    output = plain(weights, *leaves)
    output.backward(_gradient_of(output))
    grads = {name: tensor.grad for name, tensor in weights.items()}
    return Outcome(output.detach(), [leaf.grad for leaf in leaves], grads, {})


def _on_rank(
    parallel: ParallelConfig,
    make: Callable[[Axis], nn.Module],
    call: Callable[..., Tensor],
    weights: Tensors,
    inputs: tuple[Tensor, ...],
    plant: Callable[[], None],
) -> Outcome:
    plant()
    axis = build_mesh(parallel, torch.device("cpu")).tensor
    layer = make(axis)
    load_weights(layer, weights, axis)
    leaves = [_leaf(tensor) for tensor in inputs]
    output = call(layer, axis, *leaves)
    output.backward(_gradient_of(output))
    slots = [(name, getattr(module, attribute)) for name, module, attribute in iter_parameter_slots(layer)]
    grads = {name: parameter.grad for name, parameter in slots}
    shards = {name: shard_of(parameter) for name, parameter in slots}
    return Outcome(output.detach(), [leaf.grad for leaf in leaves], grads, shards)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor


def _gradient_of(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=output.dtype)
