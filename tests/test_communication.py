"""What a Transformer layer communicates, by the formulas of the papers: this often, so many bytes, not once more."""

import dataclasses
from collections import Counter

import pytest
import torch

from megalite.config.schema import ParallelConfig
from megalite.layers.cross_entropy import Target
from megalite.mesh import build_mesh
from megalite.models import build_model, materialize
from tests.collectives import Collectives
from tests.layouts import Layout
from tests.models.configs import GPT, LLAMA
from tests.ranks import run_ranks
from tests.test_layouts import prepare

CPU = torch.device("cpu")
B, S, D = 2, 16, GPT.hidden_size
LENGTH = {1: S, 2: S, 3: 12}  # of a sequence, by context size
WHOLE = 4 * B * S * D  # bytes of x_BSD in fp32


def collectives(config, parallel, recompute):
    """Those of the forward and of the backward pass of a model."""
    mesh = build_mesh(parallel, CPU)
    model = build_model(config, mesh, recompute)
    materialize(model, mesh, seed=1)
    tokens = torch.arange(B * LENGTH[mesh.context.size] // mesh.context.size).view(B, -1) % config.known_vocab_size
    target = Target(tokens, torch.ones(tokens.shape))
    with Collectives(mesh) as forward:
        loss = model.train()(tokens, target)
    with Collectives(mesh) as backward:
        loss.backward()
    return forward.counts, backward.counts


def per_layer(config, parallel, recompute="none"):
    """What one layer adds: the difference of three layers and two."""
    world_size = parallel.tensor * parallel.context
    found = []
    for layers in (2, 3):
        deep = dataclasses.replace(config, num_layers=layers)
        found.append(run_ranks(world_size, collectives, deep, parallel, recompute)[0])
    return [deep - shallow for shallow, deep in zip(*found, strict=True)]


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_tensor_parallel(config, tensor):
    """Shoeybi et al. 2019, section 3: two all-reduces forward, two backward, of B S D."""
    forward, backward = per_layer(config, ParallelConfig(tensor=tensor, sequence=False))
    assert forward == backward == Counter({("all_reduce", "tensor", WHOLE): 2})


@pytest.mark.parametrize("tensor", [2, 4])
def test_sequence_parallel(tensor):
    """Korthikanti et al. 2022, section 4.2.2: each all-reduce becomes an all-gather and a reduce-scatter.

    Backward, each column-parallel layer gathers its input a second time, which is what it costs to keep only a part of
    it. Gradients of what is replicated, norms and row biases, are summed besides: a few vectors of D.
    """
    forward, backward = per_layer(GPT, ParallelConfig(tensor=tensor))
    both = Counter({("all_gather", "tensor", WHOLE): 2, ("reduce_scatter", "tensor", WHOLE): 2})
    assert forward == both
    norms, biases = Counter({("all_reduce", "tensor", 2 * 4 * D): 2}), Counter({("all_reduce", "tensor", 4 * D): 2})
    assert backward == both + Counter({("all_gather", "tensor", WHOLE): 2}) + norms + biases


def test_ulysses():
    """Jacobs et al. 2023: q, k and v go, the result comes back, both ways; theirs take four exchanges, these two."""
    forward, backward = per_layer(LLAMA, ParallelConfig(context=2))
    heads = LLAMA.num_attention_heads + 2 * LLAMA.num_kv_heads
    token = 4 * LLAMA.head_dim * B * S // 2
    wanted = Counter(
        {("all_to_all", "context", heads * token): 1, ("all_to_all", "context", LLAMA.num_attention_heads * token): 1}
    )
    assert forward == backward == wanted


@pytest.mark.parametrize("context", [2, 3])
def test_ring(context):
    """Liu et al. 2023: k and v go round, c - 1 sends; backward once more, and their gradients all the way home."""
    forward, backward = per_layer(LLAMA, ParallelConfig(context=context, context_method="ring"))
    kv = 2 * LLAMA.num_kv_heads * LLAMA.head_dim * 4 * B * LENGTH[context] // context
    assert forward == Counter({("send", "context", kv): context - 1})
    assert backward == Counter({("send", "context", kv): 2 * context - 1})


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("sequence", [False, True])
def test_what_recomputation_adds(recompute, sequence):
    """Selective: nothing. Full: the forward pass's collectives again, but for the last, whose result nobody needs."""
    parallel = ParallelConfig(tensor=2, sequence=sequence)
    plain, again = per_layer(GPT, parallel), per_layer(GPT, parallel, recompute)
    assert again[0] == plain[0]
    added = again[1] - plain[1]
    if recompute == "selective":
        assert added == Counter()
    elif sequence:
        assert added == Counter({("all_gather", "tensor", WHOLE): 2, ("reduce_scatter", "tensor", WHOLE): 1})
    else:
        assert added == Counter({("all_reduce", "tensor", WHOLE): 1})


def step_collectives(layout):
    """Those of a whole step of the engine, and the number of this rank's parameters."""
    engine, batches = prepare(layout)
    with Collectives(engine.mesh) as step:
        engine.train_step(batches(0), 0, 1e-3, requests=(0, 1))
    return step.counts, sum(parameter.numel() for _, parameter in engine.parameters())


def test_a_step_of_zero_0():
    """Over data: the gradients once, the loss. Over tensor beside the layers: the norm. Over all: what is counted.

    That is the number of tokens and the requests, together.
    """
    layout = Layout("gpt", 2, False, (1, "auto"), 0, 1, "none", False)
    counts, parameters = run_ranks(4, step_collectives, layout)[0]
    over_data = Counter({key: count for key, count in counts.items() if key[1] == "data"})
    assert over_data == Counter({("all_reduce", "data", size): 1 for size in (4 * parameters, 4)})
    assert counts["all_reduce", "world", 3 * 8] == 1
    assert sum(count for (_, axis, _), count in counts.items() if axis == "world") == 1
    assert counts["all_reduce", "tensor", 4] == 1
