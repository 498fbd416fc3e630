"""Models of transformers with random weights, copied in: the same logits."""

import pytest
import torch

from megalite.config.schema import ModelConfig, ParallelConfig, RotaryScalingConfig
from megalite.convert.huggingface import from_huggingface, load_logical
from megalite.errors import CheckpointError
from megalite.mesh import build_mesh, single_mesh
from megalite.models import build_model, materialize
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")

GPT2 = ModelConfig(
    vocab_size=301,
    max_sequence_length=64,
    num_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    activation="gelu_tanh",
)
LLAMA = ModelConfig(
    vocab_size=301,
    max_sequence_length=64,
    num_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    ffn_hidden_size=80,
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="swiglu",
    positions="rotary",
    rotary_base=5000.0,
    rotary_scaling=RotaryScalingConfig(factor=4.0, original_max_sequence_length=16),
    bias=False,
    tied_embeddings=False,
)


def gpt2():
    config = transformers.GPT2Config(vocab_size=301, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    return _randomised(transformers.GPT2LMHeadModel(config))


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=301,
        max_position_embeddings=64,
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )
    return _randomised(transformers.LlamaForCausalLM(config))


def _randomised(model):
    """Norms and biases too: ones and zeros would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens():
    return torch.randint(301, (2, 40), generator=torch.Generator().manual_seed(1))


def our_logits(config, state_dict, tensor):
    mesh = build_mesh(ParallelConfig(tensor=tensor), CPU)
    model = build_model(config, mesh).eval()
    materialize(model, mesh, seed=0)
    load_logical(model, mesh, from_huggingface(state_dict, config))
    with torch.no_grad():
        return model(tokens())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("config", "make"),
    [
        (GPT2, gpt2),
        (LLAMA, llama),
    ],
    ids=["gpt2", "llama"],
)
def test_logits(config, make, tensor):
    theirs = make()
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    assert wanted.std() > 0.5  # logits of a size at which the bar means something
    for found in run_ranks(tensor, our_logits, config, theirs.state_dict(), tensor):
        assert (found - wanted).abs().max().item() <= 1e-4


def test_a_swapped_projection_is_seen():
    theirs = llama()
    state_dict = dict(theirs.state_dict())
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    state_dict[gate], state_dict[up] = state_dict[up], state_dict[gate]
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    (found,) = run_ranks(1, our_logits, LLAMA, state_dict, 1)
    assert (found - wanted).abs().max().item() > 1e-2


def test_a_tied_llama_has_no_head_of_its_own():
    tied = ModelConfig(**{**vars(LLAMA), "tied_embeddings": True})
    assert "head.output.weight" not in from_huggingface(llama(tied=True).state_dict(), tied)


def test_old_files_carry_buffers():
    state_dict = {
        **gpt2().state_dict(),
        "transformer.h.0.attn.bias": torch.ones(1),
        "h.1.attn.masked_bias": torch.ones(1),
    }
    assert from_huggingface(state_dict, GPT2).keys() == from_huggingface(gpt2().state_dict(), GPT2).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"), r"lack model\.layers\.2\.mlp\.up_proj"),
        (lambda weights: weights.update(extra=torch.ones(1)), "1 tensors of the weights have no place .* first extra"),
        (lambda weights: weights.pop("model.embed_tokens.weight"), "neither a GPT-2 .* nor a Llama"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    state_dict = dict(llama().state_dict())
    change(state_dict)
    with pytest.raises(CheckpointError, match=message):
        from_huggingface(state_dict, LLAMA)


def test_loading_checks_names_and_shapes():
    mesh = single_mesh(CPU)
    model = build_model(LLAMA, mesh)
    materialize(model, mesh, seed=0)
    tensors = from_huggingface(llama().state_dict(), LLAMA)
    with pytest.raises(
        CheckpointError, match=r"head\.norm\.weight_offset: the weights have shape \(2,\), the model has \(48,\)"
    ):
        load_logical(model, mesh, {**tensors, "head.norm.weight_offset": torch.ones(2)})
    with pytest.raises(
        CheckpointError, match=r"1 missing \(first head\.norm\.weight_offset\), 1 left over \(first other\)"
    ):
        load_logical(
            model, mesh, {("other" if name == "head.norm.weight_offset" else name): t for name, t in tensors.items()}
        )
