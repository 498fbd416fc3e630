"""The keys of a command as text, read from the schema: name, type, default, and the comment beside it."""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from megalite.config import schema


def describe_keys(class_name: str) -> list[str]:
    """One line for each key of the dataclass `class_name` in the schema, nested keys dotted."""
    return [f"  {line}" for line in _lines(getattr(schema, class_name), "")]


def _lines(cls: type, prefix: str) -> list[str]:
    comments = _comments(cls)
    hints = typing.get_type_hints(cls)
    lines = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += _lines(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        comment = f"  # {comments[field.name]}" if field.name in comments else ""
        lines.append(f"{prefix}{field.name}={_default(field)}  ({_type_name(hint)}){comment}")
    return lines


def _comments(cls: type) -> dict[str, str]:
    """The comments that stand behind the fields in the source."""
    pattern = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(cls)))


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "???"
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
    return "path, or keys" if dataclasses.is_dataclass(hint) else "mapping"
