"""One rank's entry under a launcher that is not ours."""

import pytest

from megalite import train as entry


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
