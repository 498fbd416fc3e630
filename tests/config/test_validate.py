import dataclasses
import math
import re

import pytest

from megalite.config import schema, schema_data
from megalite.config.validate import resolve_auto, validate_train
from megalite.config.validate_commands import (
    validate_data_build,
    validate_doctor,
    validate_evaluate,
    validate_generate,
    validate_tokenizer_train,
)
from megalite.config.validate_layout import padded_vocab_size
from megalite.errors import ConfigError

TRAIN = schema.TrainConfig(
    run_name="run",
    run_dir="outputs/run",
    model=schema.ModelConfig(),
    trainer=schema.TrainerConfig(micro_batch_size=32),
    parallel=schema.ParallelConfig(),
    engine=schema.EngineConfig(),
    objective=schema.ObjectiveConfig(),
    optimizer=schema.OptimizerConfig(),
    schedule=schema.ScheduleConfig(),
    data=schema.DataConfig(train=(schema.StoreConfig(path="a"),)),
    checkpoint=schema.CheckpointConfig(),
    launch=schema.LaunchConfig(),
    logging=schema.LoggingConfig(),
)
ROTARY = {"model.positions": "rotary", "model.rotary_scaling": schema.RotaryScalingConfig()}
STORE, CHANGE = schema.StoreConfig, schema.WeightsConfig


def changed(config, changes):
    """`config` with dotted keys changed."""
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        value = changed(getattr(config, name), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{name: value})
    return config


def case(key, bad, good, *words, **context):
    """A rule: `key=bad` is refused with the key, what was found and `words` in the message; `key=good` passes."""
    also = {
        name.replace("__", "."): value for name, value in context.items() if name not in ("world", "device", "found")
    }
    return pytest.param(
        key, bad, good, words, also, context.get("world", 1), context.get("device", "cpu"), context.get("found", bad)
    )


RING = {"parallel__context": 2, "parallel__context_method": "ring"}
RULES = [
    # the model
    *(case(f"model.{key}", 0, 2, "at least 1") for key in ("num_layers", "num_attention_heads", "num_key_value_heads")),
    *(case(f"model.{key}", 0, 2, "at least 1") for key in ("head_size", "ffn_hidden_size", "vocab_size")),
    case("model.hidden_size", 0, 256, "at least 1"),
    case("model.max_sequence_length", 0, 2048, "at least 1"),
    case("model.num_attention_heads", 3, 8, "does not divide model.hidden_size=128", "1, 2, 4, 8", "model.head_size"),
    case("model.num_attention_heads", 256, 128, "does not divide model.hidden_size=128"),
    case("model.num_key_value_heads", 3, 2, "must divide model.num_attention_heads=4", "allowed: 1, 2, 4"),
    case("model.head_size", 31, 32, "even", model__positions="rotary"),
    case("model.hidden_size", 129, 132, "sinusoidal positions need an even number", model__positions="sinusoidal",
         model__num_attention_heads=3),
    case("model.dropout", 1.0, 0.99, "at least 0 and below 1"),
    case("model.dropout", -0.1, 0.0, "at least 0"),
    case("model.dropout", math.nan, 0.0, "at least 0"),
    case("model.init_std", 0.0, 1e-9, "above 0"),
    case("model.norm_eps", math.nan, 1e-9, "above 0"),
    case("model.rotary_base", 0.0, 1e6, "above 0"),
    case("model.rotary_scaling", schema.RotaryScalingConfig(), None, "no effect with model.positions=learned", "null",
         found="learned"),
    case("model.rotary_scaling.factor", 0.5, 2.0, "at least 1", **ROTARY),
    case("model.rotary_scaling.low_frequency_factor", 4.0, 3.9, "high_frequency_factor=4.0", **ROTARY),
    case("model.rotary_scaling.original_max_sequence_length", 0, 1, "at least 1", **ROTARY),
    case("model.rotary_scaling.beta_slow", 32.0, 31.0, "model.rotary_scaling.beta_fast=32.0", **ROTARY),
    case("model.rotary_scaling.method", "ntk", "linear", "heads of 4 at least, not 2", **ROTARY, model__head_size=2),
    case("model.sliding_window", 0, 1, "at least 1"),
    case("model.attention_soft_cap", 0.0, 50.0, "above 0"),
    case("model.logit_soft_cap", -1.0, 30.0, "above 0"),
    # the trainer
    *(case(f"trainer.{key}", 0, 1, "at least 1") for key in ("steps", "log_every", "max_skipped_steps")),
    case("trainer.micro_batch_size", -1, 8, "at least 1"),
    case("trainer.global_batch_size", -1, 64, "at least 1"),
    case("trainer.global_batch_size", 48, 64, "= 32 x 1 = 32", "nearest: 32 or 64"),
    case("trainer.global_batch_size", 96, 128, "= 32 x 2 = 64", "nearest: 64 or 128", world=2),
    case("trainer.global_batch_size", 32, 96, "= 32 x 3 = 96", "nearest: 96", world=6, parallel__tensor=2),
    case("trainer.eval_every", -1, 0, "must be 0"),
    case("trainer.eval_every", 5, 0, "data.validation names no store"),
    case("trainer.stop_after", 101, 100, "between 1 and trainer.steps=100"),
    case("trainer.stop_after", 0, 1, "between 1 and trainer.steps=100"),
    # parallel
    case("parallel.tensor", 0, 1, "at least 1"),
    case("parallel.tensor", 4, 2, "number of processes, which is 2", "allowed: 1, 2", "launch.nproc_per_node", world=2),
    case("parallel.tensor", 8, 4, "model.num_attention_heads=4", "allowed: 1, 2, 4", world=8,
         trainer__micro_batch_size=4),
    case("parallel.tensor", 4, 2, "model.num_key_value_heads=2", "allowed: 1, 2", world=4, model__num_key_value_heads=2,
         trainer__micro_batch_size=4),
    case("parallel.tensor", 4, 2, "model.ffn_hidden_size=510", "1, 2, 3", world=4, model__ffn_hidden_size=510,
         trainer__micro_batch_size=4),
    case("parallel.tensor", 3, 1, "padded vocabulary of 128 rows", world=3, model__vocab_size=100,
         model__num_attention_heads=6, model__hidden_size=192, model__ffn_hidden_size=768, trainer__micro_batch_size=1,
         trainer__global_batch_size=3),
    case("parallel.context", 0, 1, "at least 1"),
    case("parallel.context", 3, 2, "which is 4", "allowed: 1, 2, 4", world=4, trainer__micro_batch_size=4),
    case("parallel.context_method", "ulysses", "ring", "the 2 key and value heads", "allowed: ring", "1, 2", world=4,
         parallel__context=4, model__num_key_value_heads=2, trainer__micro_batch_size=4),
    case("model.dropout", 0.1, 0.0, "ring attention", "parallel.context_method=ulysses", world=2, **RING),
    case("model.attention_soft_cap", 9.0, None, "ring attention", world=2, **RING),
    case("engine.compile", True, False, "ring attention", world=2, found="true", **RING),
    case("model.sliding_window", 9, None, "parallel.context=2", world=2, **RING),
    case("data.sequence_length", 62, 64, "multiple of 4 = 4 runs (ring, parallel.context=2) x 1 tensor ranks",
         "nearest: 60 or 64", world=2, **RING),
    case("data.sequence_length", 60, 64, "multiple of 8 = 4 runs", "x 2 tensor ranks", world=4, **RING,
         parallel__tensor=2),
    # the objective
    case("objective.label_smoothing", 1.0, 0.1, "at least 0 and below 1"),
    case("objective.z_loss", -1e-4, 1e-4, "0 (off) or more"),
    # the engine
    case("engine.precision", "bf16", "fp32", "engine.zero_stage=0", "engine.precision=fp32", engine__zero_stage=0),
    case("engine.precision", "fp16", "fp32", "engine.zero_stage=1", engine__zero_stage=0),
    case("engine.precision", "auto", "fp32", "bf16", engine__zero_stage=0, device="cuda", found="bf16"),
    case("engine.grad_clip", -1.0, 0.0, "must be 0 (off) or more"),
    case("engine.grad_clip", math.nan, 1.0, "or more"),
    case("engine.compile", True, False, "engine.zero_stage=3", "allowed: 0, 1, 2", engine__zero_stage=3, found="true"),
    case("engine.offload", "optimizer", "none", "engine.zero_stage of 1, 2 or 3", engine__zero_stage=0),
    case("engine.offload", "parameters", "optimizer", "engine.zero_stage=3", engine__zero_stage=2),
    case("engine.ds_overrides", {"optimizer": {}}, {}, "engine.ds_overrides.optimizer: ", "bf16, ", found="unknown"),
    case("engine.ds_overrides", {"fp16": {"enabled": True}}, {"fp16": {"loss_scale_window": 5}},
         "engine.ds_overrides.fp16.enabled: is derived from engine.precision", found="derived"),
    case("engine.ds_overrides", {"bf16": {"enabled": True}}, {}, "engine.ds_overrides.bf16.enabled", found="derived"),
    case("engine.ds_overrides", {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"overlap_comm": False}},
         "engine.ds_overrides.zero_optimization.stage: is derived from engine.zero_stage", found="derived"),
    case("engine.ds_overrides", {"zero_optimization": {"offload_param": {"device": "cpu"}}}, {},
         "zero_optimization.offload_param: is derived from engine.offload", found="derived"),
    case("engine.ds_overrides", {"zero_optimization": {"overlap_com": True}}, {}, "overlap_com. Did you mean "
         "engine.ds_overrides.zero_optimization.overlap_comm?", found="unknown"),
    case("logging.wandb.tags", ("a", "https://me:CANARY@host"), ("https://host",), "logging.wandb.tags[1]: holds a URL",
         found="holds"),
    case("engine.ds_overrides", {"fp16": 3}, {"dump_state": True}, "engine.ds_overrides.fp16", "group of keys",
         found="found 3"),
    case("engine.ds_overrides", {"data_types": {"x": 1}}, {"data_types": {"grad_accum_dtype": "bf16"}},
         "unknown key engine.ds_overrides.data_types.x. Allowed here: grad_accum_dtype", found="x"),
    # optimizer and schedule
    *(case("optimizer.lr", lr, 1e-5, "above 0") for lr in (0.0, -1e-4, math.nan, math.inf)),
    case("optimizer.betas", (0.9, 1.0), (0.0, 0.999), "below 1", found="[0.9, 1.0]"),
    case("optimizer.betas", (math.nan, 0.9), (0.9, 0.9), "below 1", found="nan"),
    case("optimizer.eps", 0.0, 1e-12, "above 0"),
    case("optimizer.weight_decay", -0.1, 0.0, "0 or more"),
    case("schedule.warmup_steps", 101, 100, "between 0 and trainer.steps=100"),
    case("schedule.warmup_steps", -1, 0, "between 0 and"),
    case("schedule.warmup_steps", 0, 1, "inverse_sqrt", "at least 1", schedule__name="inverse_sqrt"),
    case("schedule.min_lr_ratio", 1.1, 1.0, "between 0 and 1"),
    # data
    case("data.train", (), (STORE(path="a"), STORE(path="a")), "the list is empty", found="empty"),
    case("data.train", (STORE(path="a"), STORE(path="")), (STORE(path="a"),), "data.train[1].path", found="empty"),
    *(
        case("data.train", (STORE(path="a", weight=weight),), (STORE(path="a", weight=0.1),), "data.train[0].weight",
             "above 0", found=weight)
        for weight in (0.0, -1.0, math.nan, math.inf)
    ),
    case("data.validation", (STORE(path="x/a"), STORE(path="y/a/")), (STORE(path="x/a"), STORE(path="y/a", name="b")),
         "two stores are reported as 'a'", found="another name"),
    case("data.sequence_length", 0, 1, "at least 1"),
    case("data.prefetch", -1, 0, "0 (none) or more"),
    *(
        case("data.schedule", (CHANGE(step=2, weights=(1.0,)), bad), (CHANGE(step=2, weights=(0.5,)),), key, *words,
             found=found)
        for bad, key, found, *words in (
            (CHANGE(step=2, weights=(1.0,)), "data.schedule[1].step", 2, "above 2"),
            (CHANGE(step=9, weights=(1.0, 2.0)), "data.schedule[1].weights", [1.0, 2.0], "1 stores"),
            (CHANGE(step=9, weights=(-1.0,)), "data.schedule[1].weights", [-1.0], "0 or more"),
            (CHANGE(step=9, weights=(math.nan,)), "data.schedule[1].weights", "nan", "0 or more"),
            (CHANGE(step=9, weights=(0.0,)), "data.schedule[1].weights", [0.0], "above 0"),
        )
    ),
    case("data.schedule", (CHANGE(step=0, weights=(1.0,)),), (CHANGE(step=1, weights=(1.0,)),), "above 0", found=0),
    case("data.train", (STORE(path="a", weight=0.0),), (STORE(path="a"),), "nothing to begin with", found="every",
         data__schedule=(CHANGE(step=1, weights=(1.0,)),)),
    case("data.train", (STORE(path="a"), STORE(path="b", weight=-1.0)), (STORE(path="a"), STORE(path="b", weight=0.0)),
         "data.train[1].weight", "above 0", found=-1.0, data__schedule=(CHANGE(step=1, weights=(1.0, 1.0)),)),
    case("data.train", (STORE(path="a"), STORE(path="b", weight=0.0)), (STORE(path="a"), STORE(path="b")),
         "data.train[1].weight", "above 0", found=0.0, data__schedule=(CHANGE(step=1, weights=(1.0, 0.0)),)),
    case("data.sequence_length", 1025, 1024, "model.max_sequence_length=1024"),
    # the run
    *(case("run_name", name, "a-b_c.1,x=2+y", "letters", found=repr(name)) for name in ("a/b", "", ".x", "a b")),
    case("run_dir", "", "x", "is empty"),
    case("seed", -1, 0, "0 or more"),
    case("seed", 2**63, 2**63 - 1, "below 2^63"),
    case("checkpoint.keep", 0, 1, "at least 1"),
    case("checkpoint.save_every", -1, 0, "must be 0"),
    case("checkpoint.resume", "", "never", "auto, never"),
    case("checkpoint.allow_changes", ("optimizer.rl",), ("optimizer.lr", "data", "model.rotary_scaling.factor"),
         "there is no key 'optimizer.rl'", found="rl"),
    case("launch.nproc_per_node", 0, None, "at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "bad", "good", "words", "also", "world", "device", "found"), RULES)
def test_rule(key, bad, good, words, also, world, device, found):
    base = changed(TRAIN, also)
    validate_train(changed(base, {key: good}), world, device)
    with pytest.raises(ConfigError) as error:
        validate_train(changed(base, {key: bad}), world, device)
    lines = [line for line in str(error.value).splitlines() if key in line and all(word in line for word in words)]
    assert lines, f"no line names {key} and says {words}: {error.value}"
    assert str(found) in lines[0]


def test_every_broken_rule_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        validate_train(changed(TRAIN, {"seed": -1, "optimizer.lr": 0.0, "model.dropout": 2.0}), 1)
    assert [re.split("[: ]", line)[0] for line in str(error.value).splitlines()] == [
        *("model.dropout", "optimizer.lr", "seed"),
    ]


@pytest.mark.parametrize(
    ("precision", "device", "resolved"),
    [("auto", "cpu", "fp32"), ("auto", "cuda", "bf16"), ("fp16", "cpu", "fp16"), ("fp32", "cuda", "fp32")],
)
def test_precision(precision, device, resolved):
    config = dataclasses.replace(TRAIN, engine=schema.EngineConfig(precision=precision))
    assert resolve_auto(config, device, 1).engine.precision == resolved


@pytest.mark.parametrize(
    ("sequences", "world_size", "tensor", "given", "size"),
    [
        (32, 1, 1, 0, 32),
        (32, 2, 1, 0, 16),
        (32, 4, 2, 0, 16),
        (512, 4, 1, 0, 32),
        (96, 2, 1, 0, 24),  # the largest that divides 48
        (37, 1, 1, 0, 1),
        (32, 2, 1, 8, 8),
        (32, 3, 1, 0, 1),  # which the rules refuse, for the batch
    ],
)
def test_a_micro_batch_that_nobody_gave_divides_a_replicas_share(sequences, world_size, tensor, given, size):
    keys = {"trainer.global_batch_size": sequences, "trainer.micro_batch_size": given, "parallel.tensor": tensor}
    config = changed(TRAIN, keys)
    assert resolve_auto(config, "cpu", world_size).trainer.micro_batch_size == size
    if sequences % (world_size // tensor):
        with pytest.raises(ConfigError, match=r"must be a multiple of .* = 1 x 3 = 3; nearest: 30 or 33"):
            validate_train(config, world_size)
    else:
        validate_train(config, world_size)


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_padded_vocabulary(size, padded):
    assert padded_vocab_size(size) == padded


TOKENIZER = schema_data.TokenizerTrainConfig(
    input=("x",), output="y", tokenizer=schema_data.TokenizerConfig(), reader=schema_data.ReaderConfig()
)
BUILD = schema_data.DataBuildConfig(
    input=("x",), output="y", tokenizer=schema_data.StoreTokenizerConfig(path="t"), reader=schema_data.ReaderConfig()
)
GENERATE = schema.GenerateConfig(run_dir="x")
EVALUATE = schema.EvaluateConfig(run_dir="x")
DOCTOR = schema.DoctorConfig()


@pytest.mark.parametrize(
    ("validate", "config", "key", "bad", "good"),
    [
        (validate_tokenizer_train, TOKENIZER, "input", (), ("a", "b")),
        (validate_tokenizer_train, TOKENIZER, "input", ("a", ""), ("a",)),
        (validate_tokenizer_train, TOKENIZER, "output", "", "z"),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.vocab_size", 0, 1),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.sample_bytes", 0, 1),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.character_coverage", 0.0, 1.0),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.character_coverage", 1.1, 0.5),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.character_coverage", math.nan, 0.5),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.num_threads", 129, 128),
        (validate_tokenizer_train, TOKENIZER, "split", "train", None),
        (validate_tokenizer_train, TOKENIZER, "tokenizer.language_balance", 0.5, 0.0),
        (
            validate_tokenizer_train,
            changed(TOKENIZER, {"reader.language_column": "l"}),
            "tokenizer.language_balance",
            1.1,
            1.0,
        ),
        (validate_tokenizer_train, changed(TOKENIZER, {"reader.split_column": "s"}), "split", "test", "validation"),
        (validate_data_build, BUILD, "input", (), ("a",)),
        (validate_data_build, BUILD, "output", "", "z"),
        (validate_data_build, BUILD, "reader.max_document_bytes", 0, 1),
        (validate_tokenizer_train, TOKENIZER, "reader.max_document_bytes", 0, 1),
        (validate_data_build, BUILD, "validation_fraction", 1.0, 0.99),
        (validate_data_build, BUILD, "validation_fraction", math.nan, 0.0),
        (validate_data_build, BUILD, "workers", 0, None),
        (validate_data_build, BUILD, "shard_tokens", 0, 1),
        (validate_evaluate, EVALUATE, "micro_batch_size", 0, 1),
        (validate_generate, GENERATE, "temperature", -0.1, 0.0),
        (validate_generate, GENERATE, "temperature", math.nan, 1.0),
        (validate_generate, GENERATE, "top_p", 0.0, 1.0),
        (validate_generate, GENERATE, "top_p", 1.1, None),
        (validate_generate, GENERATE, "top_k", 0, 1),
        (validate_generate, GENERATE, "max_new_tokens", 0, 1),
        (validate_generate, GENERATE, "num_samples", 0, 1),
        (validate_generate, GENERATE, "seed", -1, 0),
        (validate_doctor, DOCTOR, "port", 65536, 65535),
        (validate_doctor, DOCTOR, "port", 0, 1),
        (validate_doctor, DOCTOR, "min_free_gib", -1.0, 0.0),
    ],
)
def test_rule_of_another_command(validate, config, key, bad, good):
    validate(changed(config, {key: good}))
    with pytest.raises(ConfigError) as error:
        validate(changed(config, {key: bad}))
    assert str(error.value).startswith(key)
