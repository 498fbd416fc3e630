"""The choices in the schema against the tables of what builds them, and the overrides against DeepSpeed."""

import itertools
import typing

import pytest
import torch
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import DeepSpeedConfig

from megalite.config import schema, schema_data
from megalite.config.validate_layout import DS_DERIVED, DS_OVERRIDES
from megalite.data_tools.cleaning import STEPS
from megalite.data_tools.formats import FORMATS
from megalite.data_tools.tokenizer_training.library_models import TRAINERS
from megalite.data_tools.tokenizer_training.sentencepiece_models import MODEL_TYPES
from megalite.engine import DTYPES, _refused_overrides
from megalite.errors import ConfigError
from megalite.layers.mlp import ACTIVATIONS
from megalite.layers.norm import NORMS
from megalite.mesh import single_mesh
from megalite.models import ARCHITECTURES, build_model, materialize
from megalite.models.recompute import run_block
from megalite.objectives import OBJECTIVES
from megalite.optim import OPTIMIZERS, SCHEDULES

MESH = single_mesh(torch.device("cpu"))
BATCH = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4}


@pytest.mark.parametrize(
    ("cls", "name", "table"),
    [
        (schema.ModelConfig, "architecture", ARCHITECTURES),
        (schema.ModelConfig, "norm", NORMS),
        (schema.ModelConfig, "activation", ACTIVATIONS),
        (schema.ObjectiveConfig, "name", OBJECTIVES),
        (schema.OptimizerConfig, "name", OPTIMIZERS),
        (schema.ScheduleConfig, "name", SCHEDULES),
        (schema.EngineConfig, "precision", {"auto", *DTYPES}),
        (schema_data.TokenizerConfig, "type", {*MODEL_TYPES, *TRAINERS}),
        (schema_data.ReaderConfig, "format", {"auto", *FORMATS}),
        (schema_data.CleanStepConfig, "step", STEPS),
    ],
)
def test_the_schema_names_what_can_be_built(cls, name, table):
    assert set(typing.get_args(typing.get_type_hints(cls)[name])) == set(table)


def test_every_kind_of_positions_is_another_model():
    logits = {}
    for positions in typing.get_args(schema.Positions):
        config = schema.ModelConfig(
            vocab_size=64, num_layers=1, hidden_size=16, num_attention_heads=2, positions=positions
        )
        model = build_model(config, MESH)
        materialize(model, MESH, seed=1)
        logits[positions] = model(torch.arange(8)[None])
    for a, b in itertools.combinations(logits.values(), 2):
        assert not torch.allclose(a, b)


def test_every_kind_of_recomputation_is_known():
    for recompute in typing.get_args(schema.Recompute):
        assert run_block(lambda x: x * 2, recompute, False, torch.ones(1)).item() == 2


class Recorded(dict):
    """A DeepSpeed configuration that notes which of its keys are looked up."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __deepcopy__(self, memo):
        return self


def test_every_key_that_may_be_overridden_is_read_by_deepspeed():
    values = {"communication_data_type": "fp32", "dump_state": False, "memory_breakdown": False}
    sections = {key: {} for key, section in DS_OVERRIDES.items() if section is not None}
    config = Recorded(BATCH | sections | values | {"wall_clock_breakdown": False})
    assert set(config) == {*BATCH, *DS_OVERRIDES}, "the test gives every key a value"
    DeepSpeedConfig(config)
    assert set(DS_OVERRIDES) <= config.read
    assert "no_such_key" not in config.read


@pytest.mark.parametrize("section", [key for key, inner in DS_OVERRIDES.items() if inner == ()])
def test_deepspeed_itself_refuses_unknown_keys_of_the_sections_left_to_it(section):
    with pytest.raises(ValueError, match="no_such_key"):
        DeepSpeedConfig({**BATCH, section: {"no_such_key": 1}})


def test_closed_sections_hold_what_deepspeed_reads():
    data_types = Recorded()
    DeepSpeedConfig({**BATCH, "data_types": data_types})
    assert set(DS_OVERRIDES["data_types"]) <= data_types.read
    config = DeepSpeedConfig(BATCH)
    models = {"bf16": config.bfloat16_config, "fp16": config.float16_config, "zero_optimization": config.zero_config}
    for section, model in models.items():
        assert set(DS_OVERRIDES[section]) <= set(type(model).model_fields), section
        assert not set(DS_OVERRIDES[section]) & set(DS_DERIVED[section]), section
    profiler = DeepSpeedFlopsProfilerConfig({}).__dict__
    assert set(DS_OVERRIDES["flops_profiler"]) <= set(profiler)


@pytest.mark.parametrize(("section", "keys"), DS_DERIVED.items())
def test_derived_keys_exist(section, keys):
    """A key that DeepSpeed renamed would no longer be kept from contradicting ours."""
    assert section in DS_OVERRIDES
    config = DeepSpeedConfig(BATCH)
    model = {"bf16": config.bfloat16_config, "fp16": config.float16_config, "zero_optimization": config.zero_config}
    assert set(keys) <= set(type(model[section]).model_fields)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"zero_optimization": {"stage": 1, "no_such_key": 1}}, "no_such_key"),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, "reduce_bucket_size"),
        ({"communication_data_type": "fp7"}, "communication_data_type"),
    ],
)
def test_what_deepspeed_refuses_is_a_config_error(overrides, words):
    with (
        pytest.raises(ConfigError, match=rf"(?s)engine\.ds_overrides: DeepSpeed refuses .*{words}"),
        _refused_overrides(overrides),
    ):
        DeepSpeedConfig({**BATCH, **overrides})


def test_without_overrides_what_deepspeed_raises_is_a_bug_of_ours():
    with pytest.raises(ValueError, match="no_such_key"), _refused_overrides({}):
        DeepSpeedConfig({**BATCH, "zero_optimization": {"no_such_key": 1}})
