"""The whole decoder against plain torch: outputs and every gradient, on 1, 2 and 4 tensor ranks, in float64."""

import collections
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite import rng
from megalite.config.schema import ParallelConfig, RotaryScalingConfig
from megalite.errors import ConfigError
from megalite.layers.cross_entropy import Target
from megalite.layers.documents import Documents, document_ids
from megalite.mesh import build_mesh, single_mesh
from megalite.models import build_model, materialize
from megalite.models.decoder import Decoder
from tests.layers.parallel import check_layer
from tests.layers.plants import PLANTS, SEQUENCE_PLANTS
from tests.models.configs import CONFIGS, GPT, LLAMA
from tests.models.plain import plain_logits, plain_losses
from tests.ranks import run_ranks

CPU = torch.device("cpu")
WEIGHTS = torch.rand((2, 9), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
CASES = [
    *((name, tensor) for name in ("gpt", "llama") for tensor in (1, 2, 4)),
    *((name, 2) for name in ("mixed", "qwen", "gemma", "neox")),
]


def tokens(config, length=9, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


def check_losses(config, tensor, **options):
    check_layer(
        tensor,
        lambda axis: Decoder(config, axis),
        lambda model, axis, tokens_BS, labels_BS: model(tokens_BS, Target(labels_BS, WEIGHTS)),
        lambda weights, tokens_BS, labels_BS: (plain_losses(weights, config, tokens_BS, labels_BS) * WEIGHTS).sum(),
        tokens(config),
        tokens(config, seed=4),
        **options,
    )


@pytest.mark.parametrize(("name", "tensor"), CASES)
def test_losses_and_gradients(name, tensor):
    check_losses(CONFIGS[name], tensor)


@pytest.mark.parametrize(("name", "tensor"), [case for case in CASES if case[1] > 1])
def test_losses_and_gradients_on_parts_of_the_sequence(name, tensor):
    """Nine tokens: padded to 10 and 12, whose gradients must not show."""
    check_losses(CONFIGS[name], tensor, sequence=True)


@pytest.mark.parametrize("name", ["gpt", "llama", "gemma"])
def test_logits_and_gradients(name):
    config = CONFIGS[name]
    check_layer(
        2,
        lambda axis: Decoder(config, axis),
        lambda model, axis, tokens_BS: model(tokens_BS),
        lambda weights, tokens_BS: plain_logits(weights, config, tokens_BS),
        tokens(config),
    )


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_planted_bugs_are_seen(name, plant):
    with pytest.raises(AssertionError, match="differs by"):
        check_losses(CONFIGS[name], 2, plant=plant)


@pytest.mark.parametrize("plant", SEQUENCE_PLANTS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_planted_bugs_on_parts_of_the_sequence_are_seen(name, plant):
    with pytest.raises(AssertionError, match="differs by"):
        check_losses(CONFIGS[name], 2, plant=plant, sequence=True)


def trained(config, recompute, parallel, dropout=0.1):
    """Losses and gradients of one micro batch with dropout, on this rank."""
    mesh = build_mesh(parallel, CPU)
    model = build_model(dataclasses.replace(config, dropout=dropout), mesh, recompute)
    materialize(model, mesh, seed=1)
    rng.seed_attention_stream(1, 2, 3, mesh.data.rank, mesh.tensor.rank)
    target = Target(tokens(config, seed=4), WEIGHTS.float())
    loss = model(tokens(config), target, rng.micro_batch_key(1, 2, 3, mesh.data.rank, CPU))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_recomputation_changes_nothing_with_dropout_on(name, tensor, sequence):
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    kept = run_ranks(tensor, trained, CONFIGS[name], "none", parallel)
    for recompute in ("selective", "full", "none"):
        again = run_ranks(tensor, trained, CONFIGS[name], recompute, parallel)
        for rank in range(tensor):
            assert all(torch.equal(a, b) for a, b in zip(kept[rank], again[rank], strict=True)), recompute
    without = run_ranks(tensor, trained, CONFIGS[name], "none", parallel, 0.0)
    assert not torch.equal(kept[0][0], without[0][0])


def saved_bytes(recompute):
    """Bytes that autograd keeps between forward and backward, beside the parameters."""
    mesh = single_mesh(CPU)
    model = build_model(GPT, mesh, recompute)
    materialize(model, mesh, seed=1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens(GPT), Target(tokens(GPT, seed=4), WEIGHTS.float()))
    del loss
    return sum(kept.values())


def test_full_recomputation_keeps_less():
    assert saved_bytes("full") < 0.5 * saved_bytes("none")


class Counter(TorchDispatchMode):
    """Counts the operations that really run: a selective block answers others from what it kept, above this mode."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def operations_of_backward(recompute, parallel):
    """How often each operation runs in the backward pass."""
    mesh = build_mesh(parallel, CPU)
    model = build_model(GPT, mesh, recompute)
    materialize(model, mesh, seed=1)
    loss = model(tokens(GPT), Target(tokens(GPT, seed=4), WEIGHTS.float()))
    with Counter() as counter:
        loss.backward()
    return counter.counts


@pytest.mark.parametrize("sequence", [False, True])
def test_selective_recomputes_norms_and_activations_but_no_product_or_collective(sequence):
    parallel = ParallelConfig(tensor=2, sequence=sequence)
    none, selective, full = (
        run_ranks(2, operations_of_backward, kind, parallel)[0] for kind in ("none", "selective", "full")
    )
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    product = "megalite::gathered_linear" if sequence else "aten::addmm"
    for forward_only in (attention, product, "aten::gelu", "aten::native_layer_norm"):
        assert none[forward_only] == 0
        assert full[forward_only] > 0
    assert selective["aten::gelu"] == full["aten::gelu"]
    assert selective["aten::native_layer_norm"] == full["aten::native_layer_norm"]
    assert selective[attention] == selective[product] == 0
    for collective in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        name = f"_c10d_functional::{collective}"
        assert selective[name] == none[name]
    reduction = "reduce_scatter_tensor" if sequence else "all_reduce"
    assert full[f"_c10d_functional::{reduction}"] > none[f"_c10d_functional::{reduction}"]


def generate(config, tensor):
    """Greedy tokens with a cache and, for the same tokens, the logits without one."""
    mesh = build_mesh(ParallelConfig(tensor=tensor, sequence=False), CPU)
    model = build_model(config, mesh).eval()
    materialize(model, mesh, seed=5, dtype=torch.float64)
    sequence, cached = tokens(config, length=4), []
    cache = model.new_cache(batch=2, max_length=12)
    with torch.no_grad():
        step = sequence
        while sequence.shape[1] < 12:
            cached.append(model(step, cache=cache))
            step = cached[-1][:, -1:].argmax(-1)
            sequence = torch.cat([sequence, step], dim=1)
        whole = model(sequence[:, :-1])
    assert (cached[-1].shape, cache.length) == ((2, 1, config.vocab_size), 11)
    assert torch.equal(whole[:, 3:].argmax(-1), sequence[:, 4:])
    return (torch.cat(cached, dim=1) - whole).abs().max().item()


@pytest.mark.parametrize("name", ["gpt", "llama", "mixed", "qwen", "gemma", "neox"])
def test_cached_decoding_equals_reading_everything_again(name):
    assert max(run_ranks(2, generate, CONFIGS[name], 2)) < 1e-10


END = 7


def document_tokens(config):
    """Documents of one token, of several, and one that a sequence begins or ends within."""
    found = tokens(config)
    found[found == END] += 1
    found[0, [0, 3, 4]] = END
    found[1, [5, 8]] = END
    return found


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", ["gpt", "llama", "mixed", "gemma"])
def test_documents_are_read_apart(name, sequence):
    config = CONFIGS[name]

    def call(model, axis, tokens_BS, labels_BS):
        documents = Documents(document_ids(tokens_BS, END), attention=True, positions=True)
        return model(tokens_BS, Target(labels_BS, WEIGHTS), documents=documents)

    def plain(weights, tokens_BS, labels_BS):
        return (plain_losses(weights, config, tokens_BS, labels_BS, END) * WEIGHTS).sum()

    check_layer(
        2,
        lambda axis: Decoder(config, axis),
        call,
        plain,
        document_tokens(config),
        tokens(config, seed=4),
        sequence=sequence,
    )


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_attention_and_positions_are_kept_apart_separately(name):
    def logits(attention, positions):
        documents = Documents(document_ids(document_tokens(CONFIGS[name]), END), attention, positions)
        mesh = single_mesh(CPU)
        model = build_model(dataclasses.replace(CONFIGS[name], init_std=0.3), mesh).eval()
        materialize(model, mesh, seed=1)
        with torch.no_grad():
            return model(document_tokens(CONFIGS[name]), documents=documents)

    together, seen_apart, counted_apart, apart = (logits(*flags) for flags in ((0, 0), (1, 0), (0, 1), (1, 1)))
    assert not torch.allclose(together, seen_apart)
    assert not torch.allclose(together, counted_apart)
    # Rotations know distances alone: seen apart, it is all the same where the count begins.
    assert torch.allclose(seen_apart, apart, atol=1e-4) == (name == "llama")


SWITCHES = {
    "qk_norm": True, "qkv_bias": True, "parallel_residual": True, "sliding_window": 3, "attention_soft_cap": 0.1,
    "logit_soft_cap": 0.1, "positions": "none", "bias": True, "tied_embeddings": True,
    **{f"rotary_scaling {method}": RotaryScalingConfig(method=method, factor=factor, original_max_sequence_length=4)
       for method, factor in (("linear", 2.0), ("ntk", 3.0), ("yarn", 5.0), ("llama3", 7.0))},
}  # fmt: skip


def test_every_switch_changes_the_logits():
    def logits(**changes):
        mesh = single_mesh(CPU)
        config = dataclasses.replace(LLAMA, **{"rotary_scaling": None, "init_std": 0.3} | changes)
        model = build_model(config, mesh).eval()
        materialize(model, mesh, seed=1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():  # no norm weight or bias stays zero
                parameter += 0.1 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter)
            return model(tokens(LLAMA))

    plain = logits()
    seen = [plain]
    for name, value in SWITCHES.items():
        found = logits(**{name.split(" ")[0]: value})
        assert all((found - other).abs().max() > 1e-6 for other in seen), name
        seen.append(found)


def test_a_sequence_longer_than_the_positions_is_refused():
    model = build_model(GPT, single_mesh(CPU))
    with pytest.raises(ConfigError, match=r"17 tokens is longer than model\.max_sequence_length=16"):
        model(torch.zeros(1, 17, dtype=torch.int64, device="meta"))


def test_dropout_in_training_needs_a_key_and_none_in_evaluation():
    mesh = single_mesh(CPU)
    model = build_model(dataclasses.replace(LLAMA, dropout=0.1), mesh)
    materialize(model, mesh, seed=1)
    with pytest.raises(ValueError, match="dropout_key"):
        model(tokens(LLAMA))
    model.eval()
    assert torch.equal(model(tokens(LLAMA)), model(tokens(LLAMA)))


@pytest.mark.parametrize("part", ["embedding", "attention branch", "mlp branch"])
def test_every_residual_site_is_dropped(part, monkeypatch):
    sites = []
    honest = rng.dropout
    monkeypatch.setattr(rng, "dropout", lambda x, p, key_K: sites.append(key_K) or honest(x, p, key_K))
    trained(GPT, "none", ParallelConfig())
    assert len(sites) == 1 + 2 * GPT.num_layers
    assert len({tuple(site.tolist()) for site in sites}) == len(sites)
