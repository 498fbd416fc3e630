"""The keys of a command as text, read from the schema: name, type, default, and the comment beside it."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from megalite.config.compose import default_values, group_choices
from megalite.config.loader import MISSING


def describe_groups(cls: type) -> list[str]:
    """One line for each conf group of the command that takes `cls`: its options, each a file in conf/."""
    return [f"  {name}={'|'.join(options)}" for name, options in group_choices(cls).items()]


def describe_keys(cls: type, primary: str) -> list[str]:
    """One line for each key of the dataclass `cls`, nested keys dotted; defaults as `conf/<primary>.yaml` has them."""
    return [f"  {line}" for line in _lines(cls, "", default_values(primary, cls))]


def _lines(cls: type, prefix: str, composed: Mapping[str, Any]) -> list[str]:
    comments = _comments(cls)
    hints = typing.get_type_hints(cls)
    lines = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += _lines(typing.cast(type, hint), f"{prefix}{field.name}.", composed)
            continue
        comment = f"  # {comments[field.name]}" if field.name in comments else ""
        key = f"{prefix}{field.name}"
        lines.append(f"{key}={_text(composed.get(key, _default(field)))}  ({_type_name(hint)}){comment}")
    return lines


def _comments(cls: type) -> dict[str, str]:
    """The comments that stand behind the fields in the source."""
    pattern = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(cls)))


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    names = {int: "int", float: "float", bool: "bool", str: "text"}
    if hint in names:
        return names[hint]
    if not dataclasses.is_dataclass(hint):
        return "mapping"
    keys = ", ".join(field.name for field in dataclasses.fields(hint))
    return f"path, or {{{keys}}}" if "path" in keys else f"{{{keys}}}"
