"""Overrides on a command line -> plain values, composed once by Hydra from `conf/`, then loaded strictly."""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import xxhash
import yaml

from megalite.config.loader import check_choice, load_config, unknown_key_message
from megalite.config.schema import TrainConfig
from megalite.errors import ConfigError

T = TypeVar("T")
CONF = "pkg://megalite.conf"

# Keys that do not change what is computed, left out of the digest that names a run: the same command, stopped earlier
# or logged elsewhere, continues the same run.
NOT_IN_RUN_NAME = ("run_name", "run_dir", "launch", "logging", "checkpoint", "trainer.stop_after")


def compose_config(primary: str, cls: type[T], overrides: Sequence[str]) -> T:
    """Compose `conf/<primary>.yaml` with `key=value` overrides and load it into the dataclass `cls`.

    Raises `ConfigError` for an unknown key or choice, a wrong type, a missing required value, or an override that adds
    (`+key`) or deletes (`~key`).
    """
    values, _ = _compose(primary, cls, overrides)
    return load_config(cls, values)


def compose_train(overrides: Sequence[str]) -> TrainConfig:
    """Compose `conf/train.yaml`; `run_name` and `run_dir` are filled in when the user gave none.

    The name is that of the experiment, or else a digest of the configuration, so that the same command finds the same
    directory again and continues.
    """
    values, choices = _compose("train", TrainConfig, overrides)
    if values.get("run_name") is None:
        values["run_name"] = choices.get("experiment") or f"run-{config_digest(values, NOT_IN_RUN_NAME)[:8]}"
    if values.get("run_dir") is None:
        values["run_dir"] = f"outputs/{values['run_name']}"
    return load_config(TrainConfig, values)


def config_digest(values: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """A digest (xxh3, 16 hex digits) of nested plain values, leaving out the dotted keys in `without`."""
    kept = flatten(values)
    for key in without:
        kept = {name: value for name, value in kept.items() if name != key and not name.startswith(key + ".")}
    return xxhash.xxh3_64_hexdigest(json.dumps(kept, sort_keys=True, default=str).encode())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_values(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain values: nested dicts, lists and scalars, as YAML and JSON hold them."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the frozen configuration as YAML, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    temporary.replace(path)


def read_config(path: Path) -> TrainConfig:
    """Read a frozen configuration. Raises `ConfigError` when the file is missing or does not fit the schema."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is run_dir the directory of a training run?") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    return load_config(TrainConfig, values)


def _compose(primary: str, cls: type, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The composed values and the chosen option of every group."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONF.removeprefix("pkg://"), version_base="1.3"):
            checked = [_checked_override(cls, override) for override in _parse(cls, overrides)]
            composed = compose(primary, overrides=checked, return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return typing.cast(dict[str, Any], values), choices


def _parse(cls: type, overrides: Sequence[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is not of the form key=value")
    return OverridesParser.create().parse_overrides([_quoted(cls, override) for override in overrides])


def _quoted(cls: type, override: str) -> str:
    """Text values in quotes, so that `prompt=To be, or not: {x}` is text and not Hydra's grammar."""
    key, _, value = override.partition("=")
    try:
        hint = _key_hint(cls, key)
    except ConfigError:
        return override  # said with more context by the checks that follow
    is_text = hint is str or str in typing.get_args(hint)
    if not is_text or value in ("", "null") or value[0] in "'\"":
        return override
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    trailing = len(value) - len(value.rstrip("\\"))
    return f"{key}='{escaped}{chr(92) * trailing}'"


def _checked_override(cls: type, override: Any) -> str:
    """The override as Hydra takes it, its key checked against the schema.

    The check makes it safe to hand Hydra the force-add form, so YAML files need not repeat every default.
    """
    from hydra.core.override_parser.types import OverrideType

    if override.type != OverrideType.CHANGE:
        raise ConfigError(
            f"{override.input_line}: keys can be changed with key=value, neither added (+) nor deleted (~)"
        )
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: several values at once are for sweeps; give one")
    key = override.key_or_group
    options = _group_options(key)
    if options and isinstance(override.value(), str):
        check_choice(key, override.value(), options)
        return str(override.input_line)
    _key_hint(cls, key)
    return f"++{override.input_line}"


def _group_options(name: str) -> list[str]:
    """The options of a conf group, or nothing when `name` is no group."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    return GlobalHydra.instance().config_loader().get_group_options(name, ObjectType.CONFIG) if "." not in name else []


def _key_hint(cls: type, key: str) -> Any:
    """The type of the dotted `key`, walked down the dataclasses; `Any` below a free mapping (`ds_overrides`).

    Raises `ConfigError` for a key that does not exist.
    """
    hint: Any = cls
    walked = ""
    for name in key.split("."):
        nested = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if nested is None:
            if typing.get_origin(hint) is dict:
                return Any
            raise ConfigError(f"unknown key {key}: {walked} holds a value, not a group of keys")
        hints = typing.get_type_hints(nested)
        walked = f"{walked}.{name}" if walked else name
        if name not in hints:
            raise ConfigError(unknown_key_message(walked, name, list(hints)))
        hint = hints[name]
    return hint
