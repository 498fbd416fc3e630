"""What the values of a sweep's keys stand for."""

import itertools

import pytest

from megalite.config.compose import compose_train
from megalite.config.sweep import combinations, read_sweep
from megalite.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "choices", "ends", "step", "log"),
    [
        ("optimizer.lr=1e-4,3e-4", ("0.0001", "0.0003"), None, None, False),
        ("model=tiny,gpt2_124m", ("tiny", "gpt2_124m"), None, None, False),
        ("model=glob(llama*)", ("llama_1b", "llama_70b", "llama_8b"), None, None, False),
        ("data.train=stores/a,stores/b", ("stores/a", "stores/b"), None, None, False),
        ("data.train=[a,b],[c]", ("[a,b]", "[c]"), None, None, False),
        ("checkpoint.resume=auto,never", ("auto", "never"), None, None, False),
        ("run_dir='a, b','c(d)'", ("'a, b'", "'c(d)'"), None, None, False),
        ("optimizer.name=choice(adam,adamw)", ("adam", "adamw"), None, None, False),
        ("trainer.steps=range(1,6,2)", ("1", "3", "5"), (1, 5), 2, False),
        ("trainer.steps=range(5,0,-2)", ("5", "3", "1"), (1, 5), 2, False),
        ("model.dropout=range(0,0.3,0.1)", ("0.0", "0.1", "0.2"), (0.0, 0.2), 0.1, False),
        ("model.dropout=interval(0,0.5)", (), (0.0, 0.5), None, False),
        ("optimizer.lr=tag(log,interval(1e-5,1e-2))", (), (1e-5, 1e-2), None, True),
        ("model.num_layers=tag(log,int(interval(1,8)))", (), (1, 8), None, True),
    ],
)
def test_values_of_a_key(line, choices, ends, step, log):
    single, (dimension,) = read_sweep(["seed=3", line])
    assert single == ["seed=3"]
    assert (dimension.key, dimension.line) == (line.partition("=")[0], line)
    assert (dimension.choices, dimension.ends, dimension.step, dimension.log) == (choices, ends, step, log)
    if ends and not choices:
        assert type(dimension.ends[0]) is type(ends[0])


def test_each_choice_is_an_override_of_one_training():
    _, (stores, names) = read_sweep(["data.train=a/b,[c,{path: d e, weight: 2}]", "run_name=x,'y'"])
    configs = [
        compose_train([f"data.train={store}", f"run_name={name}"]) for store in stores.choices for name in names.choices
    ]
    assert [tuple(store.path for store in config.data.train) for config in configs[::2]] == [("a/b",), ("c", "d e")]
    assert [config.run_name for config in configs[:2]] == ["x", "y"]


def test_the_last_key_changes_fastest():
    _, dimensions = read_sweep(["seed=1,2", "trainer.steps=range(1,4)"])
    assert list(combinations(dimensions)) == list(itertools.product(("1", "2"), ("1", "2", "3")))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["optimiser.lr=1,2"], "unknown key optimiser. Did you mean optimizer?"),
        (["model=tiny,small"], "model: found 'small', allowed: gpt2_124m"),
        (["model=interval(0,1)"], "model: found 'interval"),
        (["+seed=1,2"], "neither added"),
        (["seed=1,2", "seed=4"], "seed is given twice: seed=1,2 and seed=4"),
        (["seed=3", "seed=1,2"], "seed is given twice: seed=3 and seed=1,2"),
        (["seed=range(3,1)"], "seed=range(3,1): stands for no value"),
        (["seed=range(3,1,0)"], "seed=range(3,1,0): the step"),
        (["seed=range(0,1e9)"], "seed=range(0,1e9): stands for more than 10,000 values"),
        (["model=range(1,3)"], "model: found 'range(1"),
        (["optimizer.lr=glob(1*)"], "optimizer.lr=glob(1*)"),
        (["optimizer.lr=interval(2,1)"], "the ends of an interval must rise"),
        (["optimizer.lr=tag(log,interval(0,1))"], "must rise, from above 0"),
        (["trainer.steps=tag(log,range(0,9))"], "tag(log) needs values above 0"),
    ],
)
def test_a_key_of_a_sweep_that_cannot_be(lines, words):
    with pytest.raises(ConfigError) as error:
        read_sweep(lines)
    assert words in str(error.value)
