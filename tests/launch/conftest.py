"""A token store for the tests of commands."""

import pytest

from tests.runs import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("stores") / "words")
