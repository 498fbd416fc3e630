"""One rank's entry under a launcher that is not ours."""

import pytest

from megalite import train as entry


@pytest.mark.parametrize(("asked", "said"), [(4, True), (2, False), (None, False)])
def test_a_number_of_processes_that_has_no_effect_is_said(monkeypatch, capsys, asked, said):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "preflight", lambda config: config)
    monkeypatch.setattr(entry, "train", lambda config, place: None)
    keys = ["data.train=x", "trainer.micro_batch_size=8"]
    assert entry.main(keys + ([] if asked is None else [f"launch.nproc_per_node={asked}"])) == 0
    assert ("has no effect here: the launcher started 2 ranks" in capsys.readouterr().err) == said
