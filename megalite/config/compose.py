"""Overrides on a command line -> plain values, composed once by Hydra from `conf/`, then loaded strictly."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import xxhash

from megalite.config.loader import check_choice, load_config, unknown_key_message
from megalite.config.schema import TrainConfig
from megalite.errors import ConfigError

T = TypeVar("T")
CONF_MODULE = "megalite.conf"
EXPERIMENT = "experiment"  # the conf group whose files change keys of all others

# Layout, speed, logging: they change no number of a run without dropout. (With it another layout, micro batch or
# compiled block drops other elements, of the same distribution.) A run may go on with others of them, and they are
# left out of the digest that names it, so that it does.
SAFE = (
    "run_name", "run_dir", "launch", "logging", "guard", "checkpoint", "parallel",
    "engine.zero_stage", "engine.offload", "engine.recompute", "engine.compile",
    "trainer.stop_after", "trainer.log_every", "trainer.eval_every", "trainer.micro_batch_size",
    "trainer.max_skipped_steps", "data.validation", "data.prefetch",
    "data.skip_steps", "data.skip_documents",  # asked for, so meant
)  # fmt: skip


def compose_config(primary: str, cls: type[T], overrides: Sequence[str]) -> T:
    """Compose `conf/<primary>.yaml` with `key=value` overrides and load it into the dataclass `cls`.

    Raises `ConfigError` for an unknown key or choice, a wrong type, a missing required value, or an override that adds
    (`+key`) or deletes (`~key`). Text is taken as it stands: `prompt=${x}` is those four characters.
    """
    composed, _ = _compose(primary, cls, overrides, literal=True)
    return load_config(cls, _plain(composed))


def compose_train(overrides: Sequence[str]) -> TrainConfig:
    """Compose `conf/train.yaml`, where values may refer to others (`${seed}`); fill in `run_name` when it is null.

    The name is that of the experiment, or else a digest of the configuration, so that the same command finds the same
    directory again and continues.
    """
    composed, choices = _compose("train", TrainConfig, overrides, literal=False)
    if _unresolved(composed)["run_name"] is None:
        unnamed = config_values(load_config(TrainConfig, _plain(composed) | {"run_name": ""}))
        composed.run_name = choices.get("experiment") or f"run-{config_digest(unnamed, SAFE)[:8]}"
    return load_config(TrainConfig, _plain(composed))


def split_sweep(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides of `megalite train -m`: those with one value as they stand, and the keys with several.

    The latter as Hydra's own `Override`. Raises `ConfigError` for an unknown key or choice, and for a key that is given
    twice; what the values hold is checked once they are composed.
    """
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    single: list[str] = []
    several: dict[str, Any] = {}
    seen: dict[str, str] = {}
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            for line in overrides:
                override = _parse(TrainConfig, line, literal=False, sweep=True)
                key = override.key_or_group
                if override.is_sweep_override():
                    _checked_override(TrainConfig, override, sweep=True)
                    several[key] = override
                else:
                    single.append(line)
                if key in seen and key in several:
                    raise ConfigError(f"{key} is given twice: {seen[key]} and {line}")
                seen[key] = line
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return single, several


def default_values(primary: str, cls: type) -> dict[str, Any]:
    """What `conf/<primary>.yaml` says without overrides, dotted keys, references unresolved."""
    composed, _ = _compose(primary, cls, (), literal=False)
    return flatten(_unresolved(composed))


def group_choices(cls: type) -> dict[str, list[str]]:
    """The conf groups of a command and their options, such as `model: [gpt2_124m, ...]`."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        options = {name: _group_options(cls, name) for name in _keys(cls, top=True)}
    return {name: choices for name, choices in options.items() if choices}


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


def _compose(primary: str, cls: type, overrides: Sequence[str], literal: bool) -> tuple[Any, dict[str, Any]]:
    """The composed OmegaConf tree, references unresolved, and the chosen option of every group."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            parsed = [_parse(cls, override, literal) for override in overrides]
            lists = {one.key_or_group: one.value() for one in parsed if _is_list_of_a_group(cls, one)}
            checked = [_checked_override(cls, one) for one in parsed if one.key_or_group not in lists]
            composed = compose(primary, overrides=checked, return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    for key, value in lists.items():
        composed[key] = value
    return composed, choices


def _unresolved(composed: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return typing.cast(dict[str, Any], OmegaConf.to_container(composed))


def _plain(composed: Any) -> dict[str, Any]:
    """The tree as plain values, references (`${key}`) resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]} (${{...}} stands for another key's value)") from None


def _parse(cls: type, override: str, literal: bool, sweep: bool = False) -> Any:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in override and not override.startswith("~"):
        raise ConfigError(f"{override!r} is not of the form key=value")
    try:
        loader = GlobalHydra.instance().config_loader()  # knows what the glob of a sweep stands for
        return OverridesParser.create(loader).parse_overrides([_quoted(cls, override, literal, sweep)])[0]
    except HydraException:
        raise ConfigError(
            f"{override} cannot be read as key=value; a list is written key=[a,b], a group key={{a:1,b:2}}, and text "
            "with special characters in quotes inside the shell's: key='\"a (b)\"'"
        ) from None


def _quoted(cls: type, override: str, literal: bool, sweep: bool = False) -> str:
    """Text values in quotes, so that `prompt=To be, or not: {x}` is text and not Hydra's grammar."""
    key, _, value = override.partition("=")
    if sweep and ("," in value or re.fullmatch(r"\w+\(.*\)", value)):
        return override  # several texts
    try:
        hint = _key_hint(cls, key)
    except ConfigError:
        return override  # said with more context by the checks that follow
    if not _takes_text(hint, value) or (value in ("", "null") and not (literal and hint is str)):
        return override
    if not literal and len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]:
        return override
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    if literal:
        escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped)
    trailing = len(value) - len(value.rstrip("\\"))
    return f"{key}='{escaped}{chr(92) * trailing}'"


def _takes_text(hint: Any, value: str) -> bool:
    """Whether `value` is meant as one text: the key holds text, or a list of texts or paths, given as one item."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        is_text = args[0] is str or "path" in getattr(args[0], "__dataclass_fields__", ())
        return is_text and value[:1] not in ("[", "{") and "," not in value
    return hint is str or (origin in (typing.Union, types.UnionType) and str in args)


def _checked_override(cls: type, override: Any, sweep: bool = False) -> str:
    """The override as Hydra takes it, its key checked against the schema; one with several values if `sweep` allows it.

    The check makes it safe to hand Hydra the force-add form, so YAML files need not repeat every default.
    """
    from hydra.core.override_parser.types import OverrideType

    key, line = override.key_or_group, str(override.input_line)
    if override.type != OverrideType.CHANGE:
        raise ConfigError(f"{line}: keys can be changed with key=value, neither added (+) nor deleted (~)")
    if override.package is not None:
        raise ConfigError(f"{line}: the group {key} has one place; give {key}=...")
    if override.is_sweep_override() and not sweep:
        is_list = typing.get_origin(_key_hint(cls, key)) is tuple
        fix = f"a list is written {key}=[{line.partition('=')[2]}]" if is_list else "give one"
        raise ConfigError(f"{line}: several values at once are for sweeps; {fix}")
    options = _group_options(cls, key)
    values = [line.partition("=")[2] if override.is_sweep_override() else override.value()]
    if override.is_choice_sweep():
        values = list(override.sweep_iterator())
    if options and not any(isinstance(value, dict) for value in values):
        for value in values:
            check_choice(key, getattr(value, "text", value), options)
        return line
    _key_hint(cls, key)
    return f"++{line}"


def _is_list_of_a_group(cls: type, override: Any) -> bool:
    """Whether a list is given where conf has lists by name (`clean`): Hydra would take its items for names."""
    from hydra.core.override_parser.types import OverrideType

    key = override.key_or_group
    if override.type != OverrideType.CHANGE or override.package is not None or override.is_sweep_override():
        return False
    return isinstance(override.value(), list) and bool(_group_options(cls, key)) and _is_list(_key_hint(cls, key))


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _group_options(cls: type, name: str) -> list[str]:
    """The options of a conf group of this command, or nothing when `name` is no group. Inside Hydra's context only."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    if name not in _keys(cls, top=True):
        return []
    return GlobalHydra.instance().config_loader().get_group_options(name, ObjectType.CONFIG)


def _keys(cls: type, top: bool) -> list[str]:
    """The keys that may stand before `=`: the fields, and at the top of a training the experiment."""
    return [*typing.get_type_hints(cls), *([EXPERIMENT] if top and cls is TrainConfig else [])]


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
        top = not walked
        walked = f"{walked}.{name}" if walked else name
        hints = typing.get_type_hints(nested)
        if name not in hints:
            raise ConfigError(unknown_key_message(walked, name, _keys(typing.cast(type, nested), top)))
        hint = hints[name]
    return hint
