"""The frozen configuration: as YAML in a run directory, and on the way to ranks in an environment variable."""

import base64
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megalite.config.compose import config_values
from megalite.config.loader import load_config
from megalite.config.schema import TrainConfig
from megalite.errors import ConfigError

# A launcher of ours composes and checks once and sends the result along with the job, whose hosts may share no disk.
FROZEN = "MEGALITE_CONFIG"
_ENCODED = "zlib+base64:"
_MOST_BYTES = (128 << 10) - 256  # Linux takes 128 KiB for one variable, name and end included


def config_yaml(config: Any) -> str:
    """A configuration dataclass as YAML, keys in the schema's order."""
    return yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the frozen configuration as YAML, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(config_yaml(config), encoding="utf-8")
    temporary.replace(path)


def read_config(path: Path) -> TrainConfig:
    """Read a frozen configuration. Raises `ConfigError` when the file is missing or does not fit the schema."""
    try:
        return _load(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is run_dir the directory of a training run?") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def encoded_config(config: TrainConfig) -> str:
    """The configuration as a word that no shell changes, for launchers that write variables into a command line.

    Raises `ConfigError` when it is larger than a process can be given.
    """
    word = _ENCODED + base64.b64encode(zlib.compress(config_yaml(config).encode(), 9)).decode()
    if len(word) > _MOST_BYTES:
        raise ConfigError(
            f"the configuration takes {len(word)} bytes, compressed, and a process is given at most {_MOST_BYTES} of "
            "it: put the stores of data.train together with `megalite data merge`"
        )
    return word


def config_to_send(config: TrainConfig) -> str:
    """The value of the environment variable that ranks read: plain YAML, or `encoded_config` where that is too long."""
    text = config_yaml(config)
    return text if len(text.encode()) <= _MOST_BYTES else encoded_config(config)


def sent_config(environment: Mapping[str, str] | None = None) -> TrainConfig | None:
    """The configuration that a launcher of ours sent to this process, validated and complete; None: it sent none.

    Raises `ConfigError` when it does not fit the schema: another version of megalite is installed here.
    """
    text = (os.environ if environment is None else environment).get(FROZEN, "")
    where = f"the environment variable {FROZEN}"
    if text.startswith(_ENCODED):
        try:
            text = zlib.decompress(base64.b64decode(text.removeprefix(_ENCODED))).decode()
        except (ValueError, zlib.error) as error:
            raise ConfigError(f"{where} is damaged, or left over from something else: {error}") from None
    return _load(text, where) if text else None


def _load(text: str, where: str) -> TrainConfig:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is empty or holds no keys: it is damaged")
    return load_config(TrainConfig, values)
