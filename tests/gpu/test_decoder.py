"""The whole decoder on the GPU against plain torch on whole tensors: losses and every gradient; recompute, compile."""

import dataclasses

import pytest
import torch
import torch._dynamo

from megalite import rng
from megalite.layers.cross_entropy import Target
from megalite.mesh import single_mesh
from megalite.models import build_model, init_parameter, materialize, named_logical_parameters
from tests.models.configs import GPT, LLAMA
from tests.models.plain import plain_losses

pytestmark = pytest.mark.gpu
# Heads of 32, which the fused attention kernels take.
SIZES = {"max_sequence_length": 64, "hidden_size": 128, "num_attention_heads": 4, "head_size": 32}
CONFIGS = {
    "gpt": dataclasses.replace(GPT, **SIZES, ffn_hidden_size=512),
    "llama": dataclasses.replace(LLAMA, **SIZES, num_key_value_heads=2, ffn_hidden_size=192),
}


def tokens(config, seed=3, length=64):
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def decoder(config, device, dtype, recompute="none"):
    mesh = single_mesh(device)
    model = build_model(config, mesh, recompute)
    materialize(model, mesh, seed=1, dtype=dtype)
    return model


def step(model, config, device):
    """Losses and gradients of one training pass."""
    rng.seed_attention_stream(1, 2, 3, 0, 0)
    key = rng.micro_batch_key(1, 2, 3, 0, device) if config.dropout else None
    labels = tokens(config, seed=4).to(device)
    loss = model(tokens(config).to(device), Target(labels, torch.ones(labels.shape, device=device)), key)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def distance(found, wanted):
    """The worst relative distance, as 2-norms, over pairs of tensors."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, wanted, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def plain_step(config, dtype):
    """The same in plain torch on the CPU in float64, from weights rounded to `dtype`; in the order of `step`."""
    mesh = single_mesh(torch.device("cpu"))
    model = build_model(config, mesh)
    weights = {
        name: parameter.shard.gather([init_parameter(name, parameter, 1, mesh)]).to(dtype).double().requires_grad_()
        for name, parameter in named_logical_parameters(model)
    }
    losses = plain_losses(weights, config, tokens(config), tokens(config, seed=4))
    loss = losses.sum()
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in weights.values())]


def unpadded(model, results):
    """The gradients without the padding of the vocabulary."""
    shards = [parameter.shard for parameter in model.parameters()]
    return [results[0], *(shard.gather([grad]) for shard, grad in zip(shards, results[1:], strict=True))]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_equals_plain_torch(name, dtype, tolerance, device):
    config = CONFIGS[name]
    model = decoder(config, device, dtype)
    found = unpadded(model, step(model, config, device))
    assert distance(found, plain_step(config, dtype)) <= tolerance


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_drops_the_same_again(name, recompute, device):
    config = dataclasses.replace(CONFIGS[name], dropout=0.1)
    kept = step(decoder(config, device, torch.float32), config, device)
    again = step(decoder(config, device, torch.float32, recompute), config, device)
    assert distance(again, kept) < 1e-5  # attention's backward sums in any order
    without = step(decoder(CONFIGS[name], device, torch.float32), CONFIGS[name], device)
    assert distance(kept, without) > 1e-2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_equals_eager_in_one_graph(name, recompute, device):
    config = CONFIGS[name]
    torch._dynamo.reset()
    eager = step(decoder(config, device, torch.float32, recompute), config, device)
    model = decoder(config, device, torch.float32, recompute)
    model.compile_blocks()
    torch._dynamo.utils.counters.clear()
    assert distance(step(model, config, device), eager) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the blocks share it


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_changes_no_logits(name, device):
    config = CONFIGS[name]
    model = decoder(config, device, torch.float32).eval()
    sequence = tokens(config, length=12).to(device)
    cache = model.new_cache(batch=2, max_length=12)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in sequence.split([5, 1, 1, 5], dim=1)]
        assert distance([torch.cat(parts, dim=1)], [model(sequence)]) < 1e-5
