"""Every named model made small keeps its switches and passes the rules in every layout asked for."""

import dataclasses

import pytest

from megalite.config.compose import compose_train
from megalite.config.shrink import shrink
from megalite.config.validate_layout import validate_layout

MODELS = ("tiny", "gpt2_124m", "gpt2_1_5b", "megatron_8_3b", "llama_1b", "llama_8b", "llama_70b")
SIZES = ("vocab_size", "max_sequence_length", "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
         "head_size", "ffn_hidden_size", "dropout")  # fmt: skip


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_small_with_all_switches(name, tensor):
    config = compose_train(["data.train=x", f"model={name}", "model.dropout=0.1", f"parallel.tensor={tensor}"])
    small = shrink(config, heads_split=tensor, length_split=2 * tensor, data_split=3)
    old, new = config.model, small.model
    validate_layout(small, 3 * tensor)
    assert new.num_layers <= 2
    assert new.hidden_size <= 128
    assert new.known_vocab_size <= 512
    assert new.known_vocab_size % 128, "no row is padded"
    assert new.dropout == 0
    assert new.num_attention_heads // new.num_kv_heads == old.num_attention_heads // old.num_kv_heads
    assert new.ffn_size / new.hidden_size == pytest.approx(old.ffn_size / old.hidden_size, rel=0.05)
    kept = {key: value for key, value in dataclasses.asdict(old).items() if key not in SIZES}
    assert {key: value for key, value in dataclasses.asdict(new).items() if key not in SIZES} == kept
    assert small.trainer.global_batch_size % (3 * small.trainer.micro_batch_size) == 0
    assert small.data.sequence_length % (2 * tensor) == 0
    assert small.parallel == config.parallel


def test_one_key_head_stays_one():
    config = compose_train(["data.train=x", "model=tiny", "model.num_key_value_heads=1"])
    assert shrink(config, 4, 8, 1).model.num_kv_heads == 1
