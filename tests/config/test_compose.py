import functools
import random
import typing

import pytest
import yaml

from megalite.config import schema, schema_data
from megalite.config.compose import (
    compose_config,
    compose_train,
    config_digest,
    config_values,
    flatten,
    group_choices,
)
from megalite.config.frozen import read_config, save_config
from megalite.config.validate import validate_train
from megalite.errors import ConfigError
from tests.config.keys import PRIMARY, leaf_keys, without_none

STORE = "data.train=store"
ALL_KEYS = [(primary, key) for primary, (cls, _) in PRIMARY.items() for key in leaf_keys(cls)]
OPTIONS = [(group, option) for group, options in group_choices(schema.TrainConfig).items() for option in options]


def compose(primary, *overrides):
    cls, required = PRIMARY[primary]
    overrides = [*required, *overrides]
    return compose_train(overrides) if primary == "train" else compose_config(primary, cls, overrides)


def misspelt(key):
    """The key with the last two different neighbouring letters of its last part swapped."""
    path, _, name = key.rpartition(".")
    at = next(i for i in range(len(name) - 2, -1, -1) if name[i] != name[i + 1])
    name = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    return f"{path}.{name}" if path else name


def not_a(hint):
    """A value of the wrong type, as typed on a command line."""
    hint = without_none(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "[1]"
    if typing.get_origin(hint) is tuple:
        return "[[1]]"
    return {int: "0.5", float: "word", bool: "3", str: "[1]"}.get(hint, "word")


@pytest.mark.parametrize("primary", PRIMARY)
def test_the_yaml_of_a_command_holds_no_default_that_differs_from_the_schema(primary):
    """conf/*.yaml names groups and what is required; every other value comes from one place."""
    cls, required = PRIMARY[primary]
    config = config_values(compose(primary))
    given = {override.split("=")[0] for override in required}
    for key in leaf_keys(cls):
        flat = flatten(config)
        if key in flat and key not in given and key not in FROM_YAML:
            assert flat[key] == DEFAULTS[cls][key], key


def defaults(cls):
    """Dotted key -> the schema's default, where it has one."""
    values = {}
    for name, field in cls.__dataclass_fields__.items():
        hint = typing.get_type_hints(cls)[name]
        if hasattr(hint, "__dataclass_fields__"):
            values |= {f"{name}.{key}": value for key, value in defaults(hint).items()}
        elif field.default_factory is not field.default:
            is_plain = field.default.__class__.__name__ != "_MISSING_TYPE"
            value = field.default if is_plain else field.default_factory() if callable(field.default_factory) else None
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


DEFAULTS = {cls: defaults(cls) for cls, _ in PRIMARY.values()}
# Filled in by composition, or by the group that conf/train.yaml chooses.
FROM_YAML = {"run_name", "run_dir", "data.sequence_length", "model.max_sequence_length"}


@pytest.mark.parametrize(("primary", "key"), ALL_KEYS)
def test_every_misspelt_key_is_named_with_what_is_meant(primary, key):
    wrong = misspelt(key)
    with pytest.raises(ConfigError) as error:
        compose(primary, f"{wrong}=1")
    message = str(error.value)
    assert f"unknown key {wrong}. " in message
    assert key.rpartition(".")[2] in message.partition("Allowed here: ")[2].split(", ")
    assert f"Did you mean {key}?" in message or len(key.rpartition(".")[2]) < 6


@pytest.mark.parametrize("primary", PRIMARY)
def test_every_key_refuses_a_wrong_type(primary):
    """Through the loader, which composition ends in: a composition for each key would take minutes."""
    cls, _ = PRIMARY[primary]
    from megalite.config.loader import load_config

    values = config_values(compose(primary))
    for key, hint in leaf_keys(cls).items():
        wrong = yaml.safe_load(not_a(hint))
        with pytest.raises(ConfigError) as error:
            load_config(cls, with_value(values, key, wrong))
        assert str(error.value).startswith(key), key


def with_value(values, key, value):
    """`values` with the dotted `key` changed; groups that are null become mappings."""
    name, _, rest = key.partition(".")
    return values | {name: with_value(values[name] or {}, rest, value) if rest else value}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes_loads_and_validates(group, option):
    # Wide enough for every parallel option, short enough for every model.
    base = [] if group in ("model", "experiment") else ["model=llama_8b"]
    stores = [] if group == "experiment" else [STORE]
    config = compose_train([*base, *stores, f"{group}={option}", *ALSO.get((group, option), [])])
    validate_train(config, world_size=config.parallel.tensor)
    if group in NAMED:
        assert getattr(config, group).name == option
    elif group == "parallel":
        assert config.parallel.tensor == int(option.removeprefix("tp").replace("single", "1"))
    elif group == "engine":
        assert config.engine.zero_stage == int(option[4])
        assert (config.engine.offload != "none") == option.endswith("offload")


NAMED = ("objective", "optimizer", "schedule", "launch")
ALSO = {("schedule", "inverse_sqrt"): ["schedule.warmup_steps=10"]}


def test_the_groups_are_found():
    groups = group_choices(schema.TrainConfig)
    assert set(groups) == {
        *("experiment", "model", "parallel", "engine", "objective", "optimizer", "schedule", "launch"),
    }
    assert {"tiny", "gpt2_124m", "llama_70b"} <= set(groups["model"])
    launchers = ["deepspeed", "local", "slurm", "torchrun"]
    built = {"clean": ["chinese_web", "code", "none", "web"], "launch": launchers}
    assert group_choices(schema_data.DataBuildConfig) == built
    assert group_choices(schema_data.TokenizerTrainConfig) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+seed=1", r"\+seed=1: keys can be changed with key=value, neither added \(\+\) nor deleted \(~\)"),
        ("++seed=1", r"\+\+seed=1: keys can be changed"),
        ("+new=1", r"\+new=1: keys can be changed"),
        ("~seed", "~seed: keys can be changed"),
        ("~model", "~model: keys can be changed"),
        ("seed=1,2", "seed=1,2: several values at once are for sweeps; give one"),
        ("seed=range(1,3)", r"seed=range\(1,3\): several values"),
        ("model=tiny,gpt2_124m", "model=tiny,gpt2_124m: several values at once are for sweeps"),
        ("data.train=a,b", r"data\.train=a,b: .* a list is written data\.train=\[a,b\]"),
        ("seed", "'seed' is not of the form key=value"),
        ("--multirun", "'--multirun' is not of the form key=value"),
        ("trainer.steps=[1", r"trainer\.steps=\[1 cannot be read as key=value; a list is written"),
        ("trainer.=1", r"trainer\.=1 cannot be read"),
        ("model=tnyi", r"model: found 'tnyi', allowed: gpt2_124m, .*\. Did you mean tiny\?"),
        ("experiment=quickstrat", "experiment: found 'quickstrat', allowed: quickstart. Did you mean quickstart"),
        ("experiment=null", "experiment: found None, allowed: quickstart"),
        ("model=null", "model: found None, allowed: gpt2_124m"),
        ("experimnt=quickstart", r"unknown key experimnt\. Did you mean experiment\?"),
        ("model@x=tiny", r"model@x=tiny: the group model has one place; give model=\.\.\."),
        ("model=3", "model: found 3, allowed: gpt2_124m"),
        ("hydra=x", "unknown key hydra"),
        ("hydra.run.dir=x", "unknown key hydra"),
        ("seed.x=1", "unknown key seed.x: seed holds a value, not a group of keys"),
        ("data.train=???", "data.train is required"),
        ("run_dir=${run_dir}", "run_dir: Recursive interpolation"),
        ("run_name=${nothing}", "run_name: Interpolation key 'nothing' not found"),
        ("seed=010", "seed: expected a whole number, found '010'"),
        ("engine.compile=on", "engine.compile: expected true or false, found 'on'"),
        ("trainer.steps=1e3", "trainer.steps: expected a whole number, found 1000.0"),
    ],
)
def test_overrides_that_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_train([STORE, override])


def test_a_group_of_keys_changes_those_keys_only():
    config = compose_train([STORE, "model={num_layers: 7}"])
    assert (config.model.num_layers, config.model.max_sequence_length) == (7, 256)


def test_a_group_of_another_command_is_an_unknown_key():
    with pytest.raises(ConfigError, match="unknown key model"):
        compose("data_build", "model=tiny")


def test_values_reach_their_keys():
    config = compose_train(
        [
            "data.train=[a,{path: b, weight: 2}]",
            "optimizer.lr=1e-4",
            "optimizer.betas=[0.8,0.9]",
            "model.rotary_scaling.factor=4",
            "model.positions=rotary",
            "engine.ds_overrides.zero_optimization.reduce_bucket_size=7",
            "engine.ds_overrides.fp16={loss_scale_window: 9}",
            "logging.wandb.tags=[x,7]",
            "run_name=007",
            "trainer.stop_after=5",
            "schedule=linear",
            "schedule.warmup_steps=3",
        ]
    )
    assert [(store.path, store.weight) for store in config.data.train] == [("a", 1.0), ("b", 2.0)]
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-4, (0.8, 0.9))
    assert config.model.rotary_scaling == schema.RotaryScalingConfig(factor=4.0)
    assert config.engine.ds_overrides == {
        "zero_optimization": {"reduce_bucket_size": 7},
        "fp16": {"loss_scale_window": 9},
    }
    assert config.logging.wandb.tags == ("x", "7")
    assert (config.run_name, config.run_dir) == ("007", "outputs/007")
    assert (config.schedule.name, config.schedule.warmup_steps) == ("linear", 3)


def test_a_sequence_is_as_long_as_the_model_reaches_unless_said_otherwise():
    assert compose_train([STORE]).data.sequence_length == 256
    assert compose_train([STORE, "model=gpt2_124m"]).data.sequence_length == 1024
    assert compose_train([STORE, "data.sequence_length=7"]).data.sequence_length == 7


PATHS = [
    "/data/My Books (2)/x",
    "a[b]/c",
    "a=b",
    "100%",
    "~/x",
    "it's",
    "名/字",
    "x:y",
    "a{b}",
    "null-store",
    "'q",
    "-x",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_with_special_characters(path):
    config = compose_train([f"data.train={path}", f"run_dir={path}"])
    assert (config.data.train[0].path, config.run_dir) == (path, path)
    assert compose("data_build", f"input={path}").input == (path,)


def texts():
    """Texts three at a time, which a composition takes as prompt, run_dir and checkpoint."""
    rng = random.Random(0)
    pieces = [*"'\"\\${}[](),:=#!?~+|&;<>*%@^ \t\n", "${x}", "\\'", "${oc.env:HOME}", "春", "To be", "é", "null", "1,2"]
    drawn = ["".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(56)]
    plain = [
        "yes",
        "1e3",
        "true",
        "To be, or not: {x}",
        "'Tis",
        "${run_dir}",
        "a\\",
        "a\\${b}",
        "\\'",
        "-1",
        "~",
        "x,y",
    ]
    # Hydra's own quotes stay, for those who know them.
    kept = [text for text in plain + drawn if not (len(text) > 1 and text[0] in "'\"" and text[-1] == text[0])]
    return list(zip(kept[::3], kept[1::3], kept[2::3], strict=False))


@pytest.mark.parametrize(("prompt", "run_dir", "checkpoint"), texts())
def test_a_text_is_taken_as_it_stands(prompt, run_dir, checkpoint):
    config = compose("generate", f"prompt={prompt}", f"run_dir={run_dir}", f"checkpoint={checkpoint}")
    assert (config.prompt, config.run_dir, config.checkpoint) == (prompt, run_dir, checkpoint)


def test_an_empty_text_and_quotes_of_hydra():
    config = compose("generate", "prompt='Tis true'", "run_dir=null", 'checkpoint="To be" or "not"')
    assert (config.prompt, config.run_dir, config.checkpoint) == ("'Tis true'", "null", '"To be" or "not"')
    assert compose("generate", "prompt=", "run_dir=x", "checkpoint=null").checkpoint is None


def test_values_may_refer_to_others_in_a_training():
    config = compose_train([STORE, "run_dir=/scratch/${run_name}/${seed}", "seed=7", "run_name=x"])
    assert config.run_dir == "/scratch/x/7"
    named = compose_train([STORE, "run_dir=/scratch/${run_name}"])
    assert named.run_dir == f"/scratch/{named.run_name}"
    assert named.run_name.startswith("run-")


@functools.cache
def plain_name():
    return compose_train([STORE]).run_name


class TestRunName:
    def test_is_the_experiment_or_what_the_user_says(self):
        config = compose_train(["experiment=quickstart"])
        assert (config.run_name, config.run_dir) == ("quickstart", "outputs/quickstart")
        assert compose_train(["experiment=quickstart", "run_name=mine"]).run_dir == "outputs/mine"

    def test_is_a_stable_digest_otherwise(self):
        name = compose_train([STORE]).run_name
        assert name == plain_name()
        assert name.startswith("run-")
        assert len(name) == 12

    @pytest.mark.parametrize(
        "override",
        [
            *("trainer.stop_after=3", "logging.tensorboard=true", "logging.wandb.mode=offline", "run_dir=elsewhere"),
            *("launch.nproc_per_node=2", "checkpoint.save_every=5", "checkpoint.resume=never"),
            *("trainer.steps=100", "optimizer.lr=0.0003", "data.train=[{path: store}]"),  # what they are anyway
        ],
    )
    def test_is_not_changed_by_what_changes_no_number(self, override):
        assert compose_train([STORE, override]).run_name == plain_name()

    @pytest.mark.parametrize(
        "override", ["seed=5", "trainer.steps=7", "optimizer.lr=1e-3", "data.train=other", "model=gpt2_124m"]
    )
    def test_is_changed_by_what_does(self, override):
        assert compose_train([STORE, override]).run_name != plain_name()


def test_the_digest_leaves_out_what_it_is_told_to():
    values = {"a": {"b": 1, "c": 2}, "d": 3}
    assert config_digest(values, ("a.b",)) == config_digest({"a": {"b": 9, "c": 2}, "d": 3}, ("a.b",))
    assert config_digest(values, ("a",)) == config_digest({"d": 3})
    assert config_digest(values, ("a.b",)) != config_digest({"a": {"b": 1, "c": 9}, "d": 3}, ("a.b",))
    assert config_digest(values) == config_digest({"d": 3, "a": {"c": 2, "b": 1}})


class TestFrozenFile:
    def test_what_is_written_is_what_is_read(self, tmp_path):
        config = compose_train(["data.train=[a,b]", "model=llama_1b", "run_name=x", "run_dir=春 x"])
        save_config(config, tmp_path / "new/config.yaml")
        assert read_config(tmp_path / "new/config.yaml") == config
        assert [file.name for file in (tmp_path / "new").iterdir()] == ["config.yaml"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "does not exist: is run_dir the directory of a training run"),
            (b"a: [", "is not valid YAML"),
            (b"a:\tb: 1", "is not valid YAML"),
            (b"\xff\xfe\x00", "is not valid YAML"),
            (b"", "is empty or holds no keys"),
            (b"seed: 1\n", "run_name is required"),
            (b"sede: 1\n", "unknown key sede. Did you mean seed"),
        ],
    )
    def test_what_cannot_be_read(self, tmp_path, content, message):
        if content is not None:
            (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path / "config.yaml")
