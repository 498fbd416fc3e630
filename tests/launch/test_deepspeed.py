"""DeepSpeed's launcher over hosts: what it is given, and what is made of its end. tests/cluster runs it."""

from dataclasses import replace

import pytest

import megalite.launch.deepspeed as room
from megalite.errors import ConfigError, ResourceError
from megalite.guard.run_state import RunState
from megalite.launch.prepare import Training
from tests.runs import tiny_config


def training(tmp_path, lines: str, **launch) -> Training:
    (tmp_path / "hostfile").write_text(lines)
    keys = {"name": "deepspeed", "nodes": 2, "nproc_per_node": 2, "hostfile": str(tmp_path / "hostfile")} | launch
    return Training(tiny_config(tmp_path / "run", launch=keys), 4, "cpu")


def test_the_first_hosts_of_the_file_are_used(tmp_path):
    command = room.describe_deepspeed(training(tmp_path, "# ours\n\n  one slots=8\ntwo slots=8 \nthree slots=8\n"))
    assert f"--hostfile={tmp_path}/hostfile --num_nodes=2 --master_port=29400 --master_addr=one" in command


@pytest.mark.parametrize(
    ("lines", "message"),
    [("one slots=2\n", "names 1 hosts, launch.nodes=2"), ("one\ntwo\n", "has the line 'one'; a line is HOST slots=N")],
)
def test_a_file_that_does_not_hold_the_hosts_is_refused(lines, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        room.describe_deepspeed(training(tmp_path, lines))


@pytest.mark.parametrize(
    ("visible", "device", "word"),
    [
        ("6,7,3", "cuda", "--include=localhost:6,7"),
        ("GPU-1,GPU-2", "cuda", "--num_gpus=2"),  # the runner knows numbers only
        ("", "cuda", "--num_gpus=2"),
        ("6,7", "cpu", "--num_gpus=2"),  # left over from another machine
    ],
)
def test_ranks_of_one_host_take_the_devices_that_are_visible(visible, device, word, tmp_path, monkeypatch):
    """The runner would ignore them for --num_gpus, and count from 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = tiny_config(tmp_path / "run", launch={"name": "deepspeed", "nproc_per_node": 2})
    words = room.deepspeed_command(Training(config, 2, device))
    assert word in words
    assert "--hostfile=" in words, "or /job/hostfile would make several hosts of it"


def test_what_cannot_be_sent_is_said_before_anything_starts(tmp_path, monkeypatch):
    several = training(tmp_path, "one slots=2\ntwo slots=2\n", environment={"KEY": "two\nlines"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="pdsh, which is not installed"):
        room.start_deepspeed(several)
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    with pytest.raises(ConfigError, match=r"launch\.environment\.KEY: 'two\\nlines' has a line break"):
        room.start_deepspeed(several)


RUNNING = RunState("running", 3.0, 4.0, 4, "one", 10)


@pytest.mark.parametrize(
    ("code", "now", "outcome"),
    [
        (3, None, 3),
        (0, None, 0),  # the run directory is another disk
        (0, RUNNING, 1),  # pdsh was killed
        (75, RUNNING, 1),  # its hosts did not answer when it was to be asked to stop
        (247, RUNNING, 247),
        (241, replace(RUNNING, exit_code=2), 2),
        (143, replace(RUNNING, exit_code=1), 143),  # ended at a second signal
        (143, replace(RUNNING, exit_code=75), 75),
        (1, replace(RUNNING, exit_code=75), 75),
        (0, replace(RUNNING, exit_code=0), 0),
    ],
)
def test_what_rank_0_wrote_down_says_what_became_of_the_run(code, now, outcome):
    assert room._outcome(code, now) == outcome
