"""The commands in the documents: each is one of ours, with keys and values that exist."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from megalite.config.compose import _key_hint, compose_config, compose_train, split_sweep
from megalite.config.schema_sweep import SweepKeys
from megalite.config.validate import validate_train
from megalite.errors import ConfigError
from megalite.launch.cli import COMMANDS
from megalite.launch.prepare import world_of

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docker/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
MODULES = {"megalite.train": "train", "megalite.node_checks": "doctor"}
# What stands for the reader's own recipe: any, with a batch that many ranks can share.
RECIPE = ("experiment=mine", "experiment=...")
ANY_RECIPE = ("experiment=quickstart", "trainer.global_batch_size=1024")
# In `docker run ... megalite megalite doctor` the first one is the image.
COMMAND = re.compile(r"(?:^|\s)(megalite (?!megalite)[a-z][a-z-]*( |$).*|(?:-m|--module) megalite\.\w+ .*)")


def commands(page: str) -> list[str]:
    """Every command of ours in blocks of shell and between backticks, from the name on."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *(" ".join(words.split()) for words in inline)]:
        if match := re.search(
            r"(?:^|\s)(megalite (?!megalite)[a-z][a-z-]*( |$).*|(?:-m|--module) (?:megalite\.\w+) .*)", line
        ):
            found.append(re.split(r"\s(?:&&|\|\|?)\s", match[1])[0].rstrip("'"))
    return found


FOUND = [(page, line) for page in PAGES for line in commands(page)]


def split(line: str) -> tuple[str, list[str]]:
    """The command's name and its keys."""
    words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...")]
    if words[0] != "megalite":
        return MODULES[words[1]], words[2:]
    name = next((name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS), None)
    assert name is not None, f"there is no command {words[1:3]}"
    return name, words[1 + len(name.split()) :]


def test_commands_are_found():
    assert len(FOUND) > 30
    assert {name for name in MODULES if any(name in line for _, line in FOUND)} == set(MODULES)


@pytest.mark.parametrize(("page", "line"), FOUND)
def test_a_command_of_a_document_has_keys_and_values_that_exist(page, line):
    name, keys = split(line)
    if name == "train":
        check_train([key for key in keys if key not in ("-m", "--cfg", "--help")], is_whole=line.startswith("megalite"))
    elif COMMANDS[name].config:
        for key in keys:
            assert "=" in key, f"{key} is no key=value"
            _key_hint(COMMANDS[name].config[0], key.partition("=")[0])


def check_train(keys: list[str], is_whole: bool = True) -> None:
    """Compose every training that the keys stand for; hold it to the rules where `is_whole`, with its launcher."""
    own = [key for key in keys if key.startswith("sweep.")]
    compose_config("sweep", SweepKeys, own)
    keys = [word for key in keys if key not in own for word in (ANY_RECIPE if key in RECIPE else (key,))]
    single, several = split_sweep(keys)
    if not any(key.startswith(("data.train=", "experiment=")) for key in single):
        single.append("data.train=a store")
    values = [
        [f"{key}={value}" for value in ([override.value().start] if override.is_interval_sweep() else texts(override))]
        for key, override in several.items()
    ]
    for chosen in itertools.product(*values):
        config = compose_train([*single, *chosen])
        if is_whole:
            validate_train(config, *world_of(config.launch))


def texts(override) -> list[str]:
    return list(override.sweep_string_iterator())


def test_a_key_that_is_gone_is_seen():
    with pytest.raises(ConfigError, match=r"trainer.stepz"):
        check_train(["trainer.stepz=10"])
