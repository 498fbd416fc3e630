"""One rank's entry under a launcher that is not ours."""

import pytest
import torch.distributed as dist

from megalite import train as entry
from megalite.errors import ResourceError
from tests.ranks import run_ranks
from tests.runs import tiny_config, write_store


@pytest.mark.parametrize(("asked", "said"), [(4, True), (2, False), (None, False)])
def test_a_number_of_processes_that_has_no_effect_is_said(monkeypatch, capsys, asked, said):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "preflight", lambda config, is_alone: config)
    monkeypatch.setattr(entry, "train", lambda config, place: None)
    keys = ["data.train=x", "trainer.micro_batch_size=8"]
    assert entry.main(keys + ([] if asked is None else [f"launch.nproc_per_node={asked}"])) == 0
    assert ("has no effect here: the launcher started 2 ranks" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        (["launch.dry_run=true"], 2, "launch.dry_run: found true, but the ranks have been started"),
        (["launch.restarts=5", "launch.grace=3"], 0, "launch.restarts, launch.grace: no effect here"),
        (["launch.start_timeout=7"], 0, ""),
        ([], 0, ""),
    ],
)
def test_keys_of_our_launchers_are_not_ignored_in_silence(monkeypatch, capsys, keys, code, said):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "preflight", lambda config, is_alone: config)
    monkeypatch.setattr(entry, "train", lambda config, place: None)
    assert entry.main(["data.train=x", *keys]) == code
    told = capsys.readouterr().err
    assert said in told
    assert bool(told) == bool(said)


def agree(run_dir, store, changes):
    """On two ranks, of which the second is another host with `changes`: what each says of it."""
    if dist.get_rank():
        entry.socket.gethostname = lambda: "other"
        if "versions" in changes:
            entry.package_versions = lambda: {"python": "3.9"}
        entry.time.time = lambda real=entry.time.time: real() + changes.get("clock", 0)
    try:
        entry._check_agreement(tiny_config(run_dir, store))
    except ResourceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"versions": True}, "other has python 3.9, "),
        ({"clock": 5}, "the clock of other is +5.0 s off that of "),
        ({"clock": -1}, ""),
    ],
)
def test_ranks_of_any_launcher_compare_their_hosts(tmp_path, changes, said):
    found = run_ranks(2, agree, tmp_path / "run", write_store(tmp_path / "words"), changes)
    assert found[0] == found[1]
    assert found[0].startswith(said)
    assert bool(found[0]) == bool(said)


@pytest.mark.parametrize(("local", "nodes", "alone"), [(2, 1, True), (1, 1, False), (2, 2, False)])
def test_ranks_of_several_hosts_look_at_checkpoints_together(monkeypatch, local, nodes, alone):
    """One host alone may hold an older one than another."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(local)}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(entry, "preflight", lambda config, is_alone: asked.append(is_alone))
    monkeypatch.setattr(entry, "train", lambda config, place: None)
    launch = ["launch=torchrun", "launch.address=a", f"launch.nodes={nodes}", "launch.nproc_per_node=1"]
    assert entry.main(["data.train=x", "trainer.micro_batch_size=8", *(launch if nodes > 1 else [])]) == 0
    assert asked == [alone]
