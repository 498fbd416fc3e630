"""The same weights for every layout; names, spread and memory of what is made."""

import math
import re

import pytest
import torch

from megalite.config.schema import ModelConfig, ParallelConfig
from megalite.mesh import Axis, Mesh, build_mesh, single_mesh
from megalite.models import build_model, init_parameter, iter_parameter_slots, materialize, named_logical_parameters
from tests.models.configs import CONFIGS, GPT, LLAMA
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def place(rank, size):
    """The mesh as tensor rank `rank` of `size` sees it; initial values need no communication."""
    alone = [Axis(name, 1, 0, None) for name in ("data", "context")]
    return Mesh((*alone, Axis("tensor", size, rank, None)), alone[0], rank, size, CPU)


def whole(config, size, seed=1):
    """Full tensors by logical name, put together from every tensor rank's model."""
    ranks = []
    for rank in range(size):
        mesh = place(rank, size)
        model = build_model(config, mesh)
        materialize(model, mesh, seed)
        ranks.append(dict(named_logical_parameters(model)))
    return {name: ranks[0][name].shard.gather([local[name] for local in ranks]) for name in ranks[0]}


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_the_same_weights_bit_for_bit_on_any_number_of_ranks(name):
    single, two, four = (whole(CONFIGS[name], size) for size in (1, 2, 4))
    assert single.keys() == two.keys() == four.keys()
    for parameter in single:
        assert torch.equal(single[parameter], two[parameter]), parameter
        assert torch.equal(single[parameter], four[parameter]), parameter
    other = whole(CONFIGS[name], 1, seed=2)
    assert not torch.equal(other["embedding.tokens.weight"], single["embedding.tokens.weight"])


def test_spread_of_the_initial_values():
    config = ModelConfig(vocab_size=1000, num_layers=8, hidden_size=128, init_std=0.05, tied_embeddings=False)
    for name, tensor in whole(config, 1).items():
        if name.endswith(("bias", "norm.weight_offset")):
            assert tensor.eq(0).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            wanted = 0.05 / math.sqrt(2 * 8) if residual else 0.05
            assert tensor.std().item() == pytest.approx(wanted, rel=0.02), name
            assert abs(tensor.mean().item()) < 5 * wanted / math.sqrt(tensor.numel()), name


def test_no_two_tensors_are_alike():
    tensors = [tensor for name, tensor in whole(GPT, 1).items() if name.endswith("qkv.weight")]
    assert not torch.equal(tensors[0], tensors[1])


def test_nothing_is_left_on_the_meta_device():
    model = build_model(LLAMA, single_mesh(CPU))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    materialize(model, single_mesh(CPU), 1, torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("cpu", torch.bfloat16)}


def test_padded_rows_are_zero():
    model = build_model(GPT, single_mesh(CPU))
    materialize(model, single_mesh(CPU), 1)
    assert model.embedding.tokens.weight.shape[0] == 384
    assert model.embedding.tokens.weight[300:].eq(0).all()


def test_names_carry_the_index_in_the_whole_model():
    model = build_model(GPT, single_mesh(CPU))
    names = [name for name, _ in named_logical_parameters(model)]
    assert names[0] == "embedding.tokens.weight"
    kinds = {"attention_norm": "weight_offset", "mlp_norm": "weight_offset"}
    assert {name for name in names if name.startswith("blocks.1.")} == {
        f"blocks.1.{part}.{kind}"
        for part in ("attention_norm", "attention.qkv", "attention.output", "mlp_norm", "mlp.up", "mlp.down")
        for kind in (kinds.get(part, "weight"), "bias")
    }
    for block in model.blocks:
        block.layer += 10  # as in a later pipeline stage
    assert {name.split(".")[1] for name, _ in named_logical_parameters(model) if "blocks" in name} == {"10", "11"}


def test_split_parameters_are_marked_for_deepspeed_and_replicated_ones_are_not():
    for name, parameter in named_logical_parameters(build_model(GPT, place(0, 2))):
        replicated = "norm" in name or "positions" in name or re.search(r"(output|down)\.bias", name)
        assert getattr(parameter, "tensor_model_parallel", None) == (None if replicated else True), name


def peak_of_materialising(size):
    """Largest resident memory above the start, in bytes, while rank 0 of `size` makes its share."""
    mesh = place(0, size)
    model = build_model(WIDE, mesh)
    for name, module, attribute in list(iter_parameter_slots(model))[:1]:  # load what is loaded lazily
        init_parameter(name, getattr(module, attribute), 0, mesh)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts from here
    start = _status("VmRSS")
    materialize(model, mesh, seed=0)
    shard = sum(parameter.numel() * 4 for parameter in model.parameters())
    logical = [math.prod(parameter.shard.shape) * 4 for parameter in model.parameters()]
    return _status("VmHWM") - start, shard, max(logical), sum(logical)


WIDE = ModelConfig(vocab_size=512, num_layers=8, hidden_size=512, tied_embeddings=False)


def test_host_memory_is_the_shard_and_one_tensor():
    ((peak, shard, largest, total),) = run_ranks(1, peak_of_materialising, 4)
    slack = 6 * 2**20
    assert shard + largest + slack < 0.5 * total  # or the test would prove nothing
    assert peak <= shard + largest + slack, f"{peak} bytes for a shard of {shard} and a tensor of {largest}"


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def distributed_weights():
    mesh = build_mesh(ParallelConfig(tensor=2), CPU)
    model = build_model(GPT, mesh)
    materialize(model, mesh, seed=1)
    return {name: parameter.detach().clone() for name, parameter in named_logical_parameters(model)}


def test_replicas_start_alike_on_real_ranks():
    ranks = run_ranks(4, distributed_weights)
    for name in ranks[0]:
        assert torch.equal(ranks[0][name], ranks[2][name])
        assert torch.equal(ranks[1][name], ranks[3][name])
