"""Container images, built from nothing and run, on a machine with neither a container engine nor an image registry.

Podman builds them without a daemon, on a base that debootstrap makes, and runs them under crun as an engine would: the
container's processes are in namespaces of their own, and its first has the number 1. All of it lies in one folder.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tests.cluster.lab import Unfit, require

PACKAGES = ("podman", "crun", "debootstrap", "util-linux")
DEBIAN = "bookworm"
_BUILD_SECONDS = 2400
_RUN_SECONDS = 900  # of a command in a container: against hanging, not a measure
_FREE_BYTES = 10 * 2**30
_CONFIGURATION = {
    "storage.conf": '[storage]\ndriver = "overlay"\ngraphroot = "{0}/store"\nrunroot = "{0}/run"\n',
    # No cgroups, which a machine may have in a form that crun does not know, and none of what needs more privileges
    # than a sandbox's root has, such as higher limits. The network is the container's own loopback alone.
    "containers.conf": '[containers]\ncgroups = "disabled"\nnetns = "none"\n'
    'default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
    '[engine]\nruntime = "crun"\ncgroup_manager = "cgroupfs"\n',
}


class Images:
    """A store of images below `folder`, and containers from them. Raises `Unfit` with what is missing here."""

    def __init__(self, folder: Path):
        require(PACKAGES)
        if shutil.disk_usage(folder).free < _FREE_BYTES:
            raise Unfit(f"needs {_FREE_BYTES / 2**30:.0f} GiB of free disk in {folder}")
        self.folder = folder
        for name, text in _CONFIGURATION.items():
            (folder / name).write_text(text.format(folder))
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
        }

    def close(self) -> None:
        """End every container and remove every image."""
        self.podman("rm", "--all", "--force", "--time=0")
        shutil.rmtree(self.folder)

    def command(self, *words: str) -> list[str]:
        """Podman with `words`, in a view of the machine that has the one kind of cgroups which crun always knows."""
        script = 'mount -t cgroup2 none /sys/fs/cgroup && exec podman --tmpdir "$0" "$@"'
        return ["unshare", "--mount", "sh", "-c", script, str(self.folder / "libpod"), *words]

    def podman(self, *words: str, seconds: float = 120) -> str:
        """What podman prints."""
        done = subprocess.run(
            self.command(*words), env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, f"podman {' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def bootstrap(self, tag: str) -> None:
        """Make Debian's smallest system, and call it what the registry calls its own."""
        system = self.folder / "system"
        command = ["debootstrap", "--variant=minbase", DEBIAN, str(system)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        assert done.returncode == 0, f"debootstrap: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        archive = self.folder / "system.tar"
        subprocess.run(
            ["tar", "--directory", system, "--exclude=./dev/*", "--create", "--file", archive, "."], check=True
        )
        shutil.rmtree(system)
        self.podman("import", str(archive), tag, seconds=300)
        archive.unlink()

    def build(self, tag: str, dockerfile: Path, context: Path, **arguments: str) -> None:
        """Build an image; pip in it finds packages as the pip of this Python does, and nothing of that stays in it."""
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        self.podman(
            "build", "--isolation=chroot", "--pull=never", "--layers=false", *given, *self._pip_volumes(),
            f"--file={dockerfile}", f"--tag={tag}", str(context), seconds=_BUILD_SECONDS,
        )  # fmt: skip

    def inspect(self, image: str) -> dict:
        """What the image says of itself."""
        return json.loads(self.podman("image", "inspect", image))[0]

    def run(self, image: str, *words: str, options: Sequence[str] = ()) -> str:
        """What a command prints in a container of its own, which must end well."""
        return self.podman("run", "--rm", *options, image, *words, seconds=_RUN_SECONDS)

    def start(self, image: str, *words: str, options: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        """Start a container; the process that is returned ends with it, and with its exit code."""
        with open(log, "wb") as output:
            return subprocess.Popen(
                self.command("run", "--rm", *options, image, *words), env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _pip_volumes(self) -> list[str]:
        """Volumes that give the build this Python's pip configuration, and the local paths that it names.

        All of them are below /root, which is a folder of ours while the build runs.
        """
        home = self.folder / "home"
        (home / ".config/pip").mkdir(parents=True, exist_ok=True)
        volumes, lines = [f"--volume={home}:/root"], ["[global]"]
        for key, value in _pip_configuration().items():
            words = []
            for word in value.split():
                path = Path(urlsplit(word).path if word.startswith("file:") else word)
                if path.is_absolute() and path.exists():
                    # The pages of a package index link to files beside it.
                    source = path.parent if word.startswith("file:") else path
                    target = Path(f"/root/pip/{len(volumes)}")
                    volumes.append(f"--volume={source}:{target}:ro")
                    word = f"file://{target / path.name}" if word.startswith("file:") else str(target)
                words.append(word)
            lines.append(f"{key} = {' '.join(words)}")
        (home / ".config/pip/pip.conf").write_text("\n".join(lines) + "\n")
        return volumes


def _pip_configuration() -> dict[str, str]:
    """The settings of this Python's pip, from its files and, above them, from the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = {}
    for line in sorted(shown, key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings
