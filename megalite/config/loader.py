"""Plain nested values -> frozen dataclasses, strictly: unknown keys, wrong types and bad choices are `ConfigError`s."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megalite.errors import ConfigError

T = TypeVar("T")
MISSING = "???"  # OmegaConf's mark for a value that the user must give


def load_config(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from nested mappings, lists and scalars.

    `path` is the dotted key of `values`, for messages. Raises `ConfigError` that names the key, what was found and what
    is allowed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'}: expected a group of keys, found {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_key_message(_join(path, str(key)), str(key), list(fields)))
    loaded = {}
    for name, field in fields.items():
        key = _join(path, name)
        if name in values:
            loaded[name] = _convert(hints[name], values[name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key} is required and has no default: give it as {key}=...")
    return cls(**loaded)


def unknown_key_message(key: str, name: str, allowed: Sequence[str]) -> str:
    """The message for a key that does not exist: `key` is its dotted form, `name` its last part."""
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"Did you mean {key.removesuffix(name)}{close[0]}? " if close else ""
    return f"unknown key {key}. {hint}Allowed here: {', '.join(sorted(allowed))}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{key} is required and has no default: give it as {key}=...")
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(hint, value, key)
    if origin is typing.Literal:
        check_choice(key, value, typing.get_args(hint))
        return value
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, key)
    if dataclasses.is_dataclass(hint):
        for name in ("path", "step") if isinstance(value, str) else ():
            if name in {field.name for field in dataclasses.fields(hint)}:
                value = {name: value}  # a plain path or step stands for the group that holds it
        return load_config(typing.cast(type, hint), value, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected a mapping, found {value!r}")
        return dict(value)
    return _convert_scalar(hint, value, key)


def _convert_optional(hint: Any, value: Any, key: str) -> Any:
    if value is None:
        return None
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    assert len(inner) == 1, f"{key}: the schema allows X or X | None, not {hint}"
    return _convert(inner[0], value, key)


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`; True is not 1 here."""
    if any(choice == value and type(choice) is type(value) for choice in choices):
        return
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f". Did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{key}: found {value!r}, allowed: {', '.join(str(c) for c in choices)}{hint}")


def _convert_tuple(args: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise ConfigError(f"{key}: expected {len(args)} values, found {value!r}")
    return tuple(_convert(arg, item, f"{key}[{i}]") for i, (arg, item) in enumerate(zip(args, items, strict=True)))


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # run_name=7 is a name
    if hint is float and isinstance(value, str):
        # YAML reads 1e-4 (no dot) as text; what is meant is plain.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ConfigError(f"{key}: expected {names[hint]}, found {value!r} ({type(value).__name__})")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
