"""The benchmark of reading runs, and reports what it promises; no figure is held to anything here."""

import json
import sys

from benchmarks.data import loading


def test_a_small_run(tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    sizes = ["--repeats", "1", "--tokens", "600000", "--seconds", "0.02", "--shards", "3", "--readers", "megalite"]
    monkeypatch.setattr(sys, "argv", ["loading", *sizes, "--output", str(output)])
    loading.main()
    result = json.loads(output.read_text())
    assert result["failed"] == {}
    medians = result["medians"]
    assert set(medians) == {"read megalite", "open 10^6 tokens", "open 3 x 10^9 tokens", "order"}
    assert all(value > 0 for row in medians.values() for value in row.values())
    assert set(medians["order"]) == {"microseconds_alone", "microseconds_together"}
    assert {"milliseconds", "cpu_milliseconds", "anonymous_mib"} == set(medians["open 10^6 tokens"])
    assert result["facts"]["cores"]
    assert "read megalite" in capsys.readouterr().out
