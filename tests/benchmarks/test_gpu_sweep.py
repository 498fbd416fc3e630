"""The sweep on a CPU with tiny models: the command as a GPU machine runs it, and each part with a fault planted."""

import importlib.metadata
import json
import math
import os
import signal
import time
import warnings

import deepspeed  # noqa: F401 (slow imports: once, before parts are forked)
import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F

from benchmarks import gpu_sweep
from benchmarks.gpu import parity, syncs, training
from benchmarks.gpu.isolate import run_isolated
from megalite.engine import Engine

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--tiny", "--steps", "2", "--micro-batches", "2", "4", "--compile", "off"]


def rows_of(function, *arguments):
    """Rows of a part, run in a process of its own: an engine built here would stand in the way of later forks."""
    return run_isolated(function, 120, *arguments)


def test_the_whole_command(tmp_path, capsys):
    output = tmp_path / "sweep.json"
    assert gpu_sweep.main([*TINY, "--models", "gpt3_1_3b", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    by_part = {part: [row for row in report["rows"] if row["part"] == part] for part in gpu_sweep.PARTS}
    assert {row["status"] for row in report["rows"]} == {"ok"}
    assert by_part["facts"][0]["packages"]["torch"] == importlib.metadata.version("torch")
    assert len(by_part["layers"]) == 14
    assert len(by_part["decoder"]) == 8
    for row in by_part["layers"] + by_part["decoder"]:
        for name, error in row["errors"].items():
            # On the reference's own device and in its precision there is nothing to differ, elsewhere there is.
            assert error == 0.0 or "float64" not in (name, *row["case"].split())
        if row["case"].endswith("bfloat16"):
            assert all(1e-4 < error < 5e-2 for error in row["errors"].values())
    assert [row["where"][0]["where"].split("/")[0] for row in by_part["syncs"]] == ["deepspeed"] * 3
    assert [(row["case"], row["micro_batch_size"]) for row in by_part["train"]] == [
        ("gpt3_1_3b (tiny) B=2", 2),
        ("gpt3_1_3b (tiny) B=4", 4),
    ]
    for row in by_part["train"]:
        assert row["tokens_per_second"] * row["step_seconds_median"] == pytest.approx(row["micro_batch_size"] * 32)
        assert row["steps"] == 2
        assert row["mfu"] is None
    first = by_part["train"][0]
    assert first["loss_first"] == pytest.approx(math.log(500), abs=0.3)
    assert first["loss_last"] < first["loss_first"] - 0.2
    printed = capsys.readouterr().out
    for text in ("6 N + 12 L h s", "gpt3_1_3b (tiny) B=4", "attention grouped rotary", "the host waits, ZeRO 1", "n/a"):
        assert text in printed


def test_a_failing_part_is_a_row_and_the_rest_runs(tmp_path, monkeypatch):
    def broken(*arguments):
        raise ValueError("planted\nsecond line")

    monkeypatch.setattr(parity, "layer_cases", broken)
    monkeypatch.setattr(gpu_sweep, "ROOT", tmp_path)
    assert gpu_sweep.main([*TINY, "--parts", "facts", "layers", "train", "--models", "gpt2_124m"]) == 1
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    report = json.loads(file.read_text())
    assert file.name == f"gpu_cpu_{report['date'][:10]}.json"
    assert [(row["part"], row["status"]) for row in report["rows"]] == [
        ("facts", "ok"),
        ("layers", "failed"),
        ("train", "ok"),
        ("train", "ok"),
    ]
    assert report["rows"][1]["error"].startswith("ValueError: planted (test_gpu_sweep.py:")


def test_without_a_gpu_the_reason_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    output = tmp_path / "sweep.json"
    assert gpu_sweep.main(["--parts", "facts", "--output", str(output)]) == 1
    assert "--device cpu --tiny" in json.loads(output.read_text())["rows"][0]["error"]


def test_nothing_starts_after_the_time_limit(tmp_path):
    output = tmp_path / "sweep.json"
    assert gpu_sweep.main([*TINY, "--time-limit", "0", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["part"] for row in rows} == set(gpu_sweep.PARTS)
    assert {row["status"] for row in rows} == {"skipped"}


def test_inside_a_part_too():
    cell = training.TrainingCell("gpt2_124m", compiled=False, tiny=True)
    rows = rows_of(training.train, "cpu", cell, [2, 4], 1, time.monotonic() - 1)
    assert [row["status"] for row in rows] == ["skipped", "skipped"]


def test_compile_is_asked_of_the_engine(monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    monkeypatch.setattr("megalite.models.decoder.Decoder.compile_blocks", lambda model: asked.touch(exist_ok=False))
    cell = training.TrainingCell("gpt2_124m", compiled=True, tiny=True)
    (row,) = rows_of(training.train, "cpu", cell, [2], 1, time.monotonic() + 60)
    assert row["case"] == "gpt2_124m (tiny) compiled B=2"
    assert row["status"] == "ok"
    assert asked.exists()


@pytest.mark.parametrize(("choice", "cells"), [("off", 1), ("on", 1), ("both", 2)])
def test_compile_chooses_cells(choice, cells):
    options = gpu_sweep.parse(["--compile", choice, "--models", "llama_1b", "--parts", "train"])
    found = gpu_sweep.cells(options, 0.0)
    assert len(found) == cells
    assert [cell.arguments[1].compiled for cell in found] == {"off": [False], "on": [True], "both": [False, True]}[
        choice
    ]


def test_micro_batches_stop_growing_when_memory_runs_out(monkeypatch):
    train_step = training.Run.train_step

    def limited(run, step, micro_batch_size):
        if micro_batch_size >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")
        return train_step(run, step, micro_batch_size)

    monkeypatch.setattr(training.Run, "train_step", limited)
    cell = training.TrainingCell("gpt2_124m", compiled=False, tiny=True)
    rows = rows_of(training.train, "cpu", cell, [2, 4, 8], 1, time.monotonic() + 60)
    assert [row["status"] for row in rows] == ["ok", "oom", "skipped"]
    assert "Tried to allocate" in rows[1]["error"]
    assert rows[2]["case"].endswith("B=8")


def test_a_run_that_diverges_fails(monkeypatch):
    summed_loss = Engine._summed_loss
    monkeypatch.setattr(Engine, "_summed_loss", lambda *arguments: summed_loss(*arguments) * math.nan)
    cell = training.TrainingCell("gpt2_124m", compiled=False, tiny=True)
    (row,) = rows_of(training.train, "cpu", cell, [2], 1, time.monotonic() + 60)
    assert row["status"] == "failed"
    assert row["error"].startswith("6 steps skipped")


def test_a_host_read_in_the_step_is_found(monkeypatch):
    train_step = Engine.train_step

    def reading(engine, micro_batches, step, rate):
        return train_step(
            engine, micro_batches, step, rate * float(engine.model.head.norm.weight_offset.detach().sum() > -1)
        )

    monkeypatch.setattr(Engine, "train_step", reading)
    # It is planted outside megalite: let this file count as its own.
    name = syncs.SyncLog._name
    monkeypatch.setattr(
        syncs.SyncLog, "_name", lambda log, file: "megalite/planted.py" if file == __file__ else name(log, file)
    )
    (row,) = rows_of(syncs.syncs, "cpu", 1)
    assert row["status"] == "failed"
    assert row["syncs_of_megalite"] == 1
    assert next(place for place in row["where"] if place["where"].startswith("megalite"))["count"] == 1


def test_on_cuda_torch_reports_the_waits(monkeypatch):
    """The recorder's own part, with torch's played: the mode is set and set back, waits are counted where they are."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    with syncs.recorded_syncs(torch.device("cuda")) as log:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        torch.cuda.synchronize(0)
    torch.cuda.synchronize()
    assert modes == ["warn", 0]
    assert [(place["count"], place["what"]) for place in log.places] == [
        (2, "synchronizing operation"),
        (1, "torch.cuda.synchronize"),
    ]
    assert all(place["where"].startswith("test_gpu_sweep.py:") for place in log.places)


def test_on_cuda_steps_are_timed_by_events(monkeypatch):
    class Event:
        recorded = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.at = Event.recorded**2

        def elapsed_time(self, other):
            return float(other.at - self.at)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = training._Clock(torch.device("cuda", 0))
    clock.tick()
    clock.tick()
    seconds, _ = clock.stop()
    assert seconds == pytest.approx([3e-3, 5e-3])
    assert len(waits) == 2  # before the first tick and after the last


def test_a_layer_that_is_wrong_in_one_precision_is_found(monkeypatch):
    layer_norm = F.layer_norm

    def careless(x, *arguments, **more):
        return layer_norm(x, *arguments, **more) * (1.001 if x.dtype == torch.float32 else 1.0)

    case = parity.layer_cases(parity.TINY_SIZES)["layernorm"]
    good = parity.layer_error(case, parity.TINY_SIZES.V, "float32", CPU)
    monkeypatch.setattr(F, "layer_norm", careless)
    bad = parity.layer_error(case, parity.TINY_SIZES.V, "float32", CPU)
    assert good < parity.LAYER_TOLERANCE["float32"] < bad


def test_a_gradient_that_is_missing_or_not_finite_is_infinitely_far():
    wanted = {"output": torch.ones(2), "gradient of x": torch.ones(2)}
    assert parity.worst_distance(wanted, wanted) == 0.0
    assert parity.worst_distance({"output": torch.ones(2)}, wanted) == math.inf
    assert parity.worst_distance(wanted | {"gradient of x": torch.tensor([1.0, math.nan])}, wanted) == math.inf
    assert parity.worst_distance(wanted | {"output": torch.tensor([1.0, 2.0])}, wanted) == pytest.approx(2**-0.5)


def test_compiled_blocks_are_compared_too(monkeypatch):
    compiled = []
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **how: (compiled.append(how), compile_block(m, **how)))
    config = parity.decoder_config("llama", parity.TINY_SIZES)
    precision = torch.float32
    eager, fused = (
        parity.run_decoder(config, parity.TINY_SIZES, "none", c, precision, precision, CPU) for c in (False, True)
    )
    assert parity.worst_distance(fused, eager) < 1e-5
    assert compiled == [{"fullgraph": True, "dynamic": False, "backend": "aot_eager"}] * 2


def test_a_part_that_is_killed_keeps_its_rows():
    def killed(emit):
        emit({"case": "a", "status": "ok"})
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_isolated(killed, 60.0) == [
        {"case": "a", "status": "ok"},
        {"status": "failed", "error": "the process died: ended by signal 9"},
    ]


def test_a_part_that_hangs_is_stopped():
    started = time.monotonic()
    (row,) = run_isolated(lambda emit: time.sleep(60), 0.5)
    assert row == {"status": "failed", "error": "stopped after 0 s: the time limit"}
    assert time.monotonic() - started < 30


def test_gpt3_xl_is_the_published_size():
    config = training.model_config("gpt3_1_3b", tiny=False)
    h, layers = 2048, 24
    assert (config.num_layers, config.hidden_size, config.head_dim) == (layers, h, 128)
    assert training.count_parameters(config) == layers * (12 * h**2 + 13 * h) + (50257 + 2048 + 2) * h
    assert training.cell_config(training.TrainingCell("gpt3_1_3b", False), "cuda").data.sequence_length == 2048


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--micro-batches", "0"], ["--models", "gpt5"]])
def test_nonsense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu_sweep.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
