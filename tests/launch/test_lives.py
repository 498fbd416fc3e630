"""Ranks that died are started again, as long as that leads anywhere."""

import signal

import pytest

from megalite.launch.lives import run_lives
from tests.runs import tiny_config


def lives(tmp_path, restarts, outcomes, is_hopeless=lambda: False):
    """Run lives that end with (exit code, step saved); returns the last code and the number of lives."""
    config = tiny_config(tmp_path / "run", launch={"restarts": restarts})
    ended = []

    def start() -> int:
        code, step = outcomes[len(ended)]
        ended.append(code)
        if step:
            folder = tmp_path / f"run/checkpoints/step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").touch()
        return code

    return run_lives(start, config, is_hopeless), len(ended)


def test_a_life_that_ends_well_is_the_last(tmp_path):
    assert lives(tmp_path, 3, [(0, 0)]) == (0, 1)


@pytest.mark.parametrize("code", [2, 3, 4, 75, 128 + signal.SIGINT, 128 + signal.SIGTERM])
def test_what_another_life_would_not_mend_is_the_last(tmp_path, code):
    assert lives(tmp_path, 3, [(code, 0)]) == (code, 1)


def test_without_restarts_there_is_one_life(tmp_path):
    assert lives(tmp_path, 0, [(137, 5)]) == (137, 1)


def test_lives_in_vain_are_counted_in_a_row(tmp_path, capfd):
    died = [(137, 0), (137, 10), (137, 0), (1, 0), (137, 0)]
    assert lives(tmp_path, 2, died) == (137, 5)
    assert "3 lives in a row brought no new checkpoint: giving up" in capfd.readouterr().err


def test_a_run_that_goes_on_is_started_as_often_as_it_takes(tmp_path):
    assert lives(tmp_path, 1, [(137, step) for step in range(1, 9)] + [(0, 0)]) == (0, 9)


def test_where_no_life_can_succeed_none_is_begun(tmp_path):
    assert lives(tmp_path, 3, [(1, 10)], is_hopeless=lambda: True) == (1, 1)
