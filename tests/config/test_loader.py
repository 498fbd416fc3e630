from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from megalite.config.loader import load_config
from megalite.config.schema import StoreConfig
from megalite.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    name: str = "x"
    count: int | None = None
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    level: Literal[0, 1] = 0
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    stores: tuple[StoreConfig, ...] = ()
    free: dict[str, Any] = field(default_factory=dict)
    maybe: Inner | None = None


def load(**values):
    return load_config(Outer, {"inner": {"size": 1}, **values})


def test_defaults_and_nesting():
    assert load() == Outer(inner=Inner(size=1))
    assert load(maybe={"size": 2}).maybe == Inner(size=2)
    assert load(maybe=None).maybe is None
    assert load(free={"a": {"b": 1}}).free == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("3E5", 3e5), (3, 3.0), (0.25, 0.25), (1e-4, 1e-4), ("-1e-4", -1e-4)]
)
def test_numbers_that_yaml_reads_as_something_else(text, value):
    loaded = load(inner={"size": 1, "rate": text}).inner.rate
    assert loaded == value
    assert type(loaded) is float


def test_names_that_yaml_reads_as_numbers():
    assert load(name=7).name == "7"
    assert load(names=[1, "b"]).names == ("1", "b")


def test_one_item_stands_for_a_list_and_a_path_for_a_store():
    assert load(names="a").names == ("a",)
    assert load(stores="p").stores == (StoreConfig(path="p"),)
    assert load(stores=["p", {"path": "q", "weight": 2}]).stores == (
        StoreConfig(path="p"),
        StoreConfig(path="q", weight=2.0),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "y"}, r"unknown key nmae\. Did you mean name\? Allowed here: .*names.*stores"),
        (
            {"inner": {"size": 1, "siez": 2}},
            r"unknown key inner\.siez\. Did you mean inner\.size\? Allowed here: rate, s",
        ),
        ({"inner": {"size": 1, 7: 2}}, r"unknown key inner\.7\. Allowed here"),
        ({"stores": [{"path": "p"}, {"pth": "p"}]}, r"unknown key stores\[1\]\.pth\. Did you mean stores\[1\]\.path"),
        ({"inner": {}}, r"inner\.size is required and has no default: give it as inner\.size="),
        ({"inner": {"size": "???"}}, r"inner\.size is required"),
        ({"stores": [{}]}, r"stores\[0\]\.path is required"),
        ({"inner": 3}, r"inner: expected a group of keys, found 3"),
        ({"inner": None}, r"inner: expected a group of keys, found None"),
        ({"inner": {"size": 1.0}}, r"inner\.size: expected a whole number, found 1\.0 \(float\)"),
        ({"inner": {"size": "1"}}, r"inner\.size: expected a whole number, found '1' \(str\)"),
        ({"inner": {"size": True}}, r"inner\.size: expected a whole number, found True"),
        ({"inner": {"size": None}}, r"inner\.size: expected a whole number, found None"),
        ({"inner": {"size": 1, "rate": "fast"}}, r"inner\.rate: expected a number, found 'fast'"),
        ({"inner": {"size": 1, "rate": True}}, r"inner\.rate: expected a number, found True"),
        ({"name": True}, r"name: expected text, found True"),
        ({"name": ["a"]}, r"name: expected text, found \['a'\]"),
        ({"name": None}, r"name: expected text, found None"),
        ({"flag": 1}, r"flag: expected true or false, found 1"),
        ({"flag": "yes"}, r"flag: expected true or false, found 'yes'"),
        ({"count": "many"}, r"count: expected a whole number, found 'many'"),
        ({"kind": "c"}, r"kind: found 'c', allowed: a, b"),
        ({"level": True}, r"level: found True, allowed: 0, 1"),
        ({"level": "1"}, r"level: found '1', allowed: 0, 1"),
        ({"pair": [0.1]}, r"pair: expected 2 values, found \[0\.1\]"),
        ({"pair": [0.1, "b"]}, r"pair\[1\]: expected a number, found 'b'"),
        ({"names": [["a"]]}, r"names\[0\]: expected text"),
        ({"stores": [3]}, r"stores\[0\]: expected a group of keys, found 3"),
        ({"free": [1]}, r"free: expected a mapping, found \[1\]"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        load(**values)


def test_the_whole_must_be_a_mapping():
    with pytest.raises(ConfigError, match="the configuration: expected a group of keys, found None"):
        load_config(Outer, None)  # an empty YAML file
