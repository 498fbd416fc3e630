"""torch.compile of the blocks at tensor 2: one graph, without breaks, equal to eager."""

import dataclasses
import os
import warnings

import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx  # slow imports, before ranks are forked

from megalite import rng
from megalite.config.schema import ParallelConfig
from megalite.layers.cross_entropy import Target
from megalite.layers.documents import Documents
from megalite.mesh import build_mesh
from megalite.models import build_model, materialize
from tests.layers.plants import copy_forgets_backward
from tests.models.configs import CONFIGS, GPT, LLAMA
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def step(model, config):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.vocab_size, (2, 8), generator=generator)
    model.zero_grad()
    rng.seed_attention_stream(1, 2, 3, 0, model.axis.rank)
    target = Target(tokens.flip(1), torch.ones(tokens.shape))
    loss = model(tokens, target, rng.micro_batch_key(1, 2, 3, 0, CPU))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def worst_difference(config, recompute, backend, sequence=True):
    """Largest difference between eager and compiled, and how many graphs were made for all blocks."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    mesh = build_mesh(ParallelConfig(tensor=2, sequence=sequence), CPU)
    model = build_model(config, mesh, recompute)
    materialize(model, mesh, seed=1)
    eager = step(model, config)
    if backend == "inductor":
        model.compile_blocks()
    else:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    torch._dynamo.utils.counters.clear()  # what the parent process compiled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = step(model, config)
        again = step(model, config)
    assert all(torch.equal(a, b) for a, b in zip(compiled, again, strict=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return max((a - b).abs().max().item() for a, b in zip(eager, compiled, strict=True)), graphs


@pytest.mark.parametrize(
    ("name", "recompute", "backend", "sequence"),
    [
        ("gpt", "none", "inductor", True),
        ("llama", "selective", "aot_eager", False),
        ("gpt", "selective", "aot_eager", True),
    ],
)
def test_compiled_equals_eager_in_one_graph(name, recompute, backend, sequence):
    for worst, graphs in run_ranks(2, worst_difference, CONFIGS[name], recompute, backend, sequence):
        assert worst < 1e-5  # fp32 rounding
        assert graphs == 1  # the blocks share it


def shared_sequence_difference():
    """Largest difference of compiled blocks where two ranks share sequences that hold several documents."""
    mesh = build_mesh(ParallelConfig(context=2), CPU)
    model = build_model(LLAMA, mesh)
    materialize(model, mesh, seed=1)
    tokens = torch.randint(LLAMA.vocab_size, (2, 8), generator=torch.Generator().manual_seed(3))
    documents = Documents(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]]), True, True)
    own = tokens[:, model.positions(4, CPU)]
    found = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        model.zero_grad()
        model(own, Target(own, torch.ones(own.shape)), documents=documents).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def test_shared_sequences_and_documents_are_compiled_too():
    assert max(run_ranks(2, shared_sequence_difference)) < 1e-5


def test_dropout_is_compiled_too():
    """With aot_eager the attention's dropout draws as in eager mode, so that all is equal."""
    config = dataclasses.replace(LLAMA, dropout=0.1)
    for worst, graphs in run_ranks(2, worst_difference, config, "full", "aot_eager"):
        assert worst < 1e-5
        assert graphs == 1


def test_a_missing_all_reduce_in_the_compiled_block_is_seen():
    def planted(config):
        mesh = build_mesh(ParallelConfig(tensor=2, sequence=False), CPU)
        model = build_model(config, mesh)
        materialize(model, mesh, seed=1)
        eager = step(model, config)
        copy_forgets_backward()
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        compiled = step(model, config)
        return max((a - b).abs().max().item() for a, b in zip(eager, compiled, strict=True))

    assert min(run_ranks(2, planted, dataclasses.replace(GPT, num_layers=1))) > 1e-3
