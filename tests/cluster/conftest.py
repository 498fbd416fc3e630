"""A cluster for the tests that want one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Slurm, Unfit, slurm
from tests.runs import write_store


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, request) -> Iterator[Slurm]:
    """A real Slurm of two nodes; with accounting, whose database takes a while, where all of this room is run."""
    accounting = "not cluster" not in request.config.getoption("markexpr")
    try:
        with slurm(tmp_path_factory.mktemp("cluster"), accounting=accounting) as running:
            yield running
    except Unfit as reason:
        pytest.skip(f"a real Slurm {reason}")


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """A token store that all hosts see."""
    return write_store(tmp_path_factory.mktemp("stores") / "words")
