"""Named models against their papers and model cards."""

from pathlib import Path

import pytest
import yaml

from megalite.config.loader import load_config
from megalite.config.schema import ModelConfig
from megalite.models import count_parameters, flops_per_token

CONF = Path(__file__).parents[2] / "conf" / "model"

# Parameters as published: OpenAI's checkpoints; Meta's model cards and safetensors indices. Megatron-LM's paper says
# "8.3 billion" for 72 layers of width 3,072: 72 (12 h^2 + 13 h) + (50,257 + 1,024 + 2) h, with h = 3,072.
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    "megatron_8_3b": 8_314_143_744,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
}


def named(name):
    return load_config(ModelConfig, yaml.safe_load((CONF / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert count_parameters(named(name)) == PUBLISHED[name]


def test_every_named_model_is_counted():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*PUBLISHED, "tiny"}


def test_tiny_takes_the_vocabulary_of_the_store():
    assert named("tiny").vocab_size is None


# By hand: 6 (L (4 h^2 + 2 h f) + V h) + 12 L h s for GPT-2; Llama has smaller keys and values and three MLP matrices.
FLOPS = [
    ("gpt2_124m", 1024, 6 * (12 * (4 * 768**2 + 2 * 768 * 3072) + 50257 * 768) + 12 * 12 * 768 * 1024),
    (
        "llama_8b",
        8192,
        6 * (32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096) + 12 * 32 * 4096 * 8192,
    ),
    (
        "llama_1b",
        2048,  # a tied head is multiplied with all the same
        6 * (16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 128256 * 2048) + 12 * 16 * 2048 * 2048,
    ),
]


@pytest.mark.parametrize(("name", "length", "wanted"), FLOPS)
def test_flops(name, length, wanted):
    assert flops_per_token(named(name), length) == wanted
