"""The loop on real ranks: stop and resume, bit for bit; what a run leaves behind; skipped steps."""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file

from megalite.checkpoint import checkpoint_bytes, disk, saver, writing
from megalite.checkpoint_format import read_manifest, write_manifest
from megalite.config.frozen import read_config
from megalite.data.files import digest_file
from megalite.data.format import TokenStore
from megalite.data.loader import Loader
from megalite.data.packing import write_packing
from megalite.engine import Engine
from megalite.errors import CheckpointError, ConfigError, DataError, MegaliteError
from megalite.guard.vitals import Vitals
from megalite.launch.spawn import spawn_ranks
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from megalite.train import train
from tests.runs import tiny_config, train_on_ranks, write_store

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


def losses(rows) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("half", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("bf16", 2), ("fp32", 3)])
def test_stop_and_resume_is_the_straight_run_bit_for_bit(precision, zero_stage, half, store, tmp_path):
    """Tensor 2 x data 2, dropout 0.1, twice `half` of the steps in separate processes against all of them."""

    def config(run_dir, **trainer):
        return tiny_config(
            run_dir,
            store,
            model=SMALL | {"dropout": 0.1},
            parallel={"tensor": 2},
            engine={"precision": precision, "zero_stage": zero_stage},
            trainer={"steps": 2 * half, "micro_batch_size": 2} | trainer,
        )

    straight = train_on_ranks(config(tmp_path / "straight"), 4)
    stopped = train_on_ranks(config(tmp_path / "resumed", stop_after=half), 4)
    assert losses(stopped) == losses(straight)[:half]
    if (precision, zero_stage) == ("fp32", 1):
        perturbed_is_seen(config, straight, tmp_path)
    resumed = train_on_ranks(config(tmp_path / "resumed"), 4)
    assert [row["step"] for row in resumed] == list(range(1, 2 * half + 1))
    assert losses(resumed) == losses(straight)
    assert [row["grad_norm"] for row in resumed] == [row["grad_norm"] for row in straight]
    assert [row["tokens_seen"] for row in resumed] == [row["tokens_seen"] for row in straight]


def perturbed_is_seen(config, straight, tmp_path) -> None:
    """One element of one moment differs in the checkpoint: the losses after it differ too."""
    half = len(straight) // 2
    shutil.copytree(tmp_path / "resumed", tmp_path / "perturbed")
    folder = tmp_path / f"perturbed/checkpoints/step_{half:08d}"
    entry = next(entry for entry in read_manifest(folder).files if entry.kind == "exp_avg")
    tensors = load_file(folder / entry.name)
    name = next(name for name in tensors if name.endswith("qkv.weight"))
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, folder / entry.name)
    path = folder / entry.name
    changed = dataclasses.replace(entry, digest=digest_file(path), num_bytes=path.stat().st_size)
    manifest = read_manifest(folder)
    files = [changed if file.name == entry.name else file for file in manifest.files]
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    perturbed = train_on_ranks(config(tmp_path / "perturbed", stop_after=half + 4), 4)
    assert losses(perturbed)[:half] == losses(straight)[:half]
    assert losses(perturbed)[half:] != losses(straight)[half : half + 4]


def test_a_checkpoint_continues_on_another_layout(store, tmp_path):
    def config(tensor, zero_stage, **trainer):
        return tiny_config(
            tmp_path / "run",
            store,
            model=SMALL,
            parallel={"tensor": tensor},
            engine={"precision": "fp32", "zero_stage": zero_stage},
            trainer={"steps": 12} | trainer,
        )

    straight = train_on_ranks(tiny_config(tmp_path / "one", store, model=SMALL, trainer={"steps": 12}), 1)
    train_on_ranks(config(2, 3, stop_after=4), 2)
    train_on_ranks(config(1, 2, stop_after=8), 2)
    rows = train_on_ranks(config(1, 0), 1)
    assert losses(rows) == pytest.approx(losses(straight), abs=1e-5)


def test_what_a_run_leaves_behind(store, tmp_path):
    run_dir = tmp_path / "run"
    config = tiny_config(
        run_dir,
        store,
        model=SMALL,
        trainer={"steps": 6, "log_every": 4, "eval_every": 3},
        data={"train": str(store), "validation": [{"path": str(store), "name": "again"}], "sequence_length": 32},
        checkpoint={"save_every": 5, "keep": 1},
        engine={"precision": "fp32", "ds_overrides": {"zero_optimization": {"reduce_bucket_size": 1000}}},
    )
    rows = train_on_ranks(config, 2)
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints", "config.yaml", "ds_config.json", "goodput.jsonl", "logs", "metrics.jsonl",
        "run.lock", "state.json",
    }  # fmt: skip
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"latest", "step_00000006"}
    assert {path.name for path in (run_dir / "logs").iterdir()} == {"heartbeats", "rank_0.log", "rank_1.log"}
    assert read_config(run_dir / "config.yaml") == config
    ds_config = json.loads((run_dir / "ds_config.json").read_text())
    assert ds_config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert [row["step"] for row in rows] == [3, 4, 6]  # evaluated, logged, the last
    assert set(rows[0]) == {"step", "eval/again/loss", "eval/again/perplexity", "eval/again/bits_per_byte"}
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second", "step_seconds",
            "data_wait_seconds", "mfu", "memory_bytes", "skipped_steps"} == set(rows[1])  # fmt: skip
    assert rows[1]["tokens_seen"] == 4 * 8 * 32
    assert rows[2]["eval/again/perplexity"] == pytest.approx(math.exp(rows[2]["eval/again/loss"]))


def test_a_finished_run_does_nothing_more(store, tmp_path):
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 3})
    rows = train_on_ranks(config, 1)
    before = (tmp_path / "run/checkpoints/step_00000003/manifest.json").stat().st_mtime_ns
    assert train_on_ranks(config, 1) == rows
    assert (tmp_path / "run/checkpoints/step_00000003/manifest.json").stat().st_mtime_ns == before


def test_starting_over_sets_the_old_checkpoints_aside(store, tmp_path):
    def config(resume="auto", **trainer):
        checkpoint = {"save_every": 2, "keep": 2, "resume": resume}
        return tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 8} | trainer, checkpoint=checkpoint)

    train_on_ranks(config(), 1)
    train_on_ranks(config(resume="never", stop_after=4), 1)
    names = sorted(path.name[:24] for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir())
    assert names == ["step_00000002", "step_00000004", "superseded-step_00000006", "superseded-step_00000008"]
    assert [row["step"] for row in train_on_ranks(config(stop_after=5), 1)] == [1, 2, 3, 4, 5]


def test_another_batch_size_goes_on_at_the_next_sample(store, tmp_path):
    """Four steps of 8, then of 4: the position counts samples, not steps."""
    first = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 8, "stop_after": 4})
    train_on_ranks(first, 1)
    allowed = {"allow_changes": ["trainer.global_batch_size"]}
    smaller = {"steps": 8, "global_batch_size": 4}
    rows = train_on_ranks(tiny_config(tmp_path / "run", store, model=SMALL, trainer=smaller, checkpoint=allowed), 1)
    assert rows[-1]["tokens_seen"] == (4 * 8 + 4 * 4) * 32
    manifest = read_manifest(tmp_path / "run/checkpoints/step_00000008")
    assert manifest.samples_consumed == 4 * 8 + 4 * 4


def test_a_store_built_again_is_noticed(tmp_path):
    store = write_store(tmp_path / "words")
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 8, "stop_after": 2})
    train_on_ranks(config, 1)
    shutil.rmtree(store)
    write_store(store, seed=1)
    with pytest.raises(CheckpointError, match=r"data\.train: the stores are not those"):
        preflight(config)
    allowed = {"allow_changes": ["data.train"]}
    preflight(tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 8}, checkpoint=allowed))


def test_what_is_fallen_back_on_is_checked_too(store, tmp_path, capfd):
    """The newest manifest cannot be read, so that only the ranks see which checkpoint it will be."""

    def config(**groups):
        groups = {"trainer": {"steps": 6, "stop_after": 4}, "checkpoint": {"save_every": 2}} | groups
        return tiny_config(tmp_path / "run", store, **({"model": SMALL} | groups))

    train_on_ranks(config(), 1)
    (tmp_path / "run/checkpoints/step_00000004/manifest.json").write_text("{")
    for groups, words in (
        ({"model": SMALL | {"activation": "relu_squared"}}, "another model"),
        ({"optimizer": {"lr": 0.05}}, "off its trajectory"),
    ):
        code = spawn_ranks(lambda place, groups=groups: train(preflight(config(**groups)), place), 1)
        assert code == CheckpointError.exit_code
        assert words in capfd.readouterr().err


def test_a_start_that_fails_leaves_the_run_as_it_was(store, tmp_path):
    def config(**groups):
        return tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2}, **groups)

    train_on_ranks(config(), 1)
    before = (tmp_path / "run/config.yaml").read_text()
    bad = {"precision": "fp32", "ds_overrides": {"zero_optimization": {"reduce_bucket_size": "bad"}}}
    failing = config(engine=bad, optimizer={"lr": 0.1}, checkpoint={"resume": "never"})
    assert spawn_ranks(lambda place: train(preflight(failing), place), 1) == ConfigError.exit_code
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_fp16_resumes_with_its_loss_scale(store, tmp_path, monkeypatch):
    """On a CPU that DeepSpeed takes for one that can: torch computes it in software."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    overrides = {"fp16": {"initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 3}}

    def config(run_dir, **trainer):
        engine = {"precision": "fp16", "ds_overrides": overrides}
        return tiny_config(run_dir, store, model=SMALL, engine=engine, trainer={"steps": 24} | trainer)

    straight = train_on_ranks(config(tmp_path / "straight"), 1)
    assert straight[11]["skipped_steps"] < straight[-1]["skipped_steps"], "the scale does not move any more"
    train_on_ranks(config(tmp_path / "resumed", stop_after=12), 1)
    resumed = train_on_ranks(config(tmp_path / "resumed"), 1)
    for key in ("loss", "grad_norm", "skipped_steps"):
        assert [row[key] for row in resumed] == [row[key] for row in straight]


def test_ranks_with_different_configurations_do_not_start(store, tmp_path, capfd):
    def rank_main(place):
        config = tiny_config(
            tmp_path / "run", store, model=SMALL, trainer={"steps": 2}, optimizer={"lr": 1.0 + place.rank}
        )
        train(preflight(config), place)

    assert spawn_ranks(rank_main, 2) == ConfigError.exit_code
    assert "ranks [1] were started with another configuration than rank 0" in capfd.readouterr().err


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(store, tmp_path, capfd):
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 3})
    train_on_ranks(config, 1)
    weights = next((tmp_path / "run/checkpoints/step_00000003").glob("weight-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code = spawn_ranks(lambda place: train(preflight(config), place), 1)
    assert code == CheckpointError.exit_code
    assert "checkpoint.resume=never" in capfd.readouterr().err


def test_skipped_steps_are_counted_across_sessions_and_end_the_run(store, tmp_path, monkeypatch, capfd):
    def config(**trainer):
        steps = {"steps": 9, "max_skipped_steps": 4} | trainer
        return tiny_config(tmp_path / "run", store, model=SMALL, trainer=steps, engine={"precision": "bf16"})

    summed_loss = Engine._summed_loss
    monkeypatch.setattr(Engine, "_summed_loss", lambda *args: summed_loss(*args) * math.nan)
    train_on_ranks(config(stop_after=2), 1)
    capfd.readouterr()
    code = spawn_ranks(lambda place: train(preflight(config()), place), 1)
    assert code == MegaliteError.exit_code
    assert "4 steps in a row were skipped" in capfd.readouterr().err
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3]


def full_disk(temporary, manifest):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_on_rank_0_ends_every_rank_with_its_reason(store, tmp_path, monkeypatch, capfd):
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2})
    monkeypatch.setattr(saver, "commit", full_disk)

    def rank_main(place):
        with pytest.raises(CheckpointError, match="rank 0 could not write a checkpoint"):
            train(preflight(config), place)

    assert spawn_ranks(rank_main, 2) == 0
    assert not list((tmp_path / "run/checkpoints").glob("step_????????"))


def test_packed_documents_of_a_changing_blend_are_the_same_read_ahead_or_not(store, tmp_path):
    """Two stores, whose weights change at step 3, with attention that stays within documents."""
    other = write_store(tmp_path / "other", seed=5)
    for path in (store, other):
        write_packing(TokenStore.open(path), "best_fit", 32, overwrite=True)
    data = {
        "train": [str(store), {"path": str(other), "weight": 2}],
        "schedule": [{"step": 3, "weights": [1, 0]}],
        "packing": "best_fit",
        "document_attention": True,
        "document_positions": True,
    }

    def run(name, **changes):
        config = tiny_config(tmp_path / name, store, model=SMALL, trainer={"steps": 6}, data=data | changes)
        return train_on_ranks(config, 1)

    ahead, at_once = run("ahead"), run("at_once", prefetch=0)
    assert losses(ahead) == losses(at_once)
    assert all(0 <= row["data_wait_seconds"] < row["step_seconds"] for row in ahead + at_once)
    log = (tmp_path / "ahead/logs/rank_0.log").read_text()
    assert re.search(r"step 0: other: 0 tokens drawn, 0\.00 epochs; 0\.\d\d by step 6\n", log)
    assert f"step 6: words: {(8 + 24) * 32:,} tokens drawn, " in log
    assert f"step 6: other: {16 * 32:,} tokens drawn, " in log


def test_a_shard_cut_during_the_run_ends_it_with_its_name(tmp_path, capfd):
    """Not with SIGBUS, and not with a hang."""
    store = write_store(tmp_path / "words")
    config = preflight(tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 50}))

    def rank_main(place):
        micro_batches = Loader.micro_batches

        def cut_at_step_5(self, samples_consumed):
            if samples_consumed == 5 * 8:
                os.truncate(store / "tokens_00000.bin", 100)
            return micro_batches(self, samples_consumed)

        Loader.micro_batches = cut_at_step_5
        train(config, place)

    assert spawn_ranks(rank_main, 1) == DataError.exit_code
    assert "tokens_00000.bin has 100 bytes" in capfd.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_an_asynchronous_save_is_the_same_checkpoint(store, tmp_path):
    """Tensor 2 x data 2, ZeRO 1, every step, so that a save waits for the one before."""

    def digests(name, **checkpoint):
        config = tiny_config(
            tmp_path / name,
            store,
            model=SMALL,
            parallel={"tensor": 2},
            trainer={"steps": 4},
            checkpoint={"save_every": 1, "keep": 9} | checkpoint,
        )
        train_on_ranks(config, 4)
        folders = sorted((tmp_path / name / "checkpoints").glob("step_*"))
        return {folder.name: [entry.digest for entry in read_manifest(folder).files] for folder in folders}

    at_once = digests("at_once")
    assert sorted(at_once) == [f"step_{step:08d}" for step in (1, 2, 3, 4)]
    assert digests("asynchronous", asynchronous=True) == at_once


def test_ephemeral_and_lasting_checkpoints(store, tmp_path):
    """Saved at every step, to be kept at multiples of four and where the run was stopped."""
    checkpoint = {"save_every": 4, "ephemeral_every": 1, "keep": 2}
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 8}, checkpoint=checkpoint)
    for stop_after, kept in ((3, [3]), (6, [4, 6]), (8, [6, 8])):
        trainer = dataclasses.replace(config.trainer, stop_after=stop_after)
        train_on_ranks(dataclasses.replace(config, trainer=trainer), 1)
        folders = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
        assert folders == [f"step_{step:08d}" for step in kept]
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert all(f"checkpoints/step_{step:08d}" in log for step in range(1, 9))


def fail_writes_of(step, times, monkeypatch):
    """Every file of the step's checkpoint finds a full disk, so many times."""
    write, left = writing._write_tensors, {}

    def full(folder, name, kind, tensors):
        if folder.name.startswith(f"step_{step:08d}") and left.setdefault(name, times):
            left[name] -= 1
            raise OSError(28, "No space left on device")
        return write(folder, name, kind, tensors)

    monkeypatch.setattr(writing, "_write_tensors", full)
    monkeypatch.setattr(disk, "RETRY_SECONDS", (0.01, 0.01))


@pytest.mark.parametrize(
    ("policy", "code", "left", "asynchronous"),
    [("continue", 0, [2, 6, 8], True), ("stop", 4, [2], False), ("stop", 4, [2], True), ("retry", 4, [2], False)],
)
def test_a_full_disk(store, tmp_path, monkeypatch, capfd, policy, code, left, asynchronous):
    """The second of some saves finds no room; the first stays, nothing half-written does."""
    checkpoint = {"save_every": 2, "keep": 9, "on_save_error": policy, "asynchronous": asynchronous}
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 8}, checkpoint=checkpoint)
    fail_writes_of(4, 99, monkeypatch)
    assert spawn_ranks(lambda place: train(preflight(config), place), 2) == code
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.name != "latest")
    assert folders == [f"step_{step:08d}" for step in left]
    errors = capfd.readouterr().err
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert "No space left on device" in (errors if code else log)


def test_a_disk_that_has_room_again_is_tried_again(store, tmp_path, monkeypatch):
    checkpoint = {"on_save_error": "retry"}
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2}, checkpoint=checkpoint)
    fail_writes_of(2, 2, monkeypatch)
    train_on_ranks(config, 1)
    assert (tmp_path / "run/checkpoints/step_00000002/manifest.json").is_file()


@pytest.mark.parametrize(("room", "name"), [(saver, "create_temporary"), (writing, "verify_file"), (saver, "commit")])
def test_every_part_of_a_save_is_tried_again(store, tmp_path, monkeypatch, capfd, room, name):
    work, calls = getattr(room, name), []

    def refused_once(*args):
        calls.append(name)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        return work(*args)

    monkeypatch.setattr(room, name, refused_once)
    monkeypatch.setattr(disk, "RETRY_SECONDS", (0.01,))
    for policy, code in (("stop", CheckpointError.exit_code), ("retry", 0)):
        run_dir = tmp_path / policy
        config = tiny_config(run_dir, store, model=SMALL, trainer={"steps": 1}, checkpoint={"on_save_error": policy})
        assert spawn_ranks(lambda place, config=config: train(preflight(config), place), 1) == code
        assert (run_dir / "checkpoints/step_00000001/manifest.json").is_file() is (code == 0)
        assert not list(run_dir.glob("checkpoints/*.tmp*")), "nothing half-written stays"
    assert "Input/output error" in capfd.readouterr().err


def test_one_save_that_fails_does_not_take_the_next_along(store, tmp_path, monkeypatch):
    """Asynchronously the failure is learned of when the next save is due."""
    checkpoint = {"save_every": 1, "keep": 9, "on_save_error": "continue", "asynchronous": True}
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 4}, checkpoint=checkpoint)
    fail_writes_of(3, 99, monkeypatch)
    train_on_ranks(config, 2)
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert folders == [f"step_{step:08d}" for step in (1, 2, 4)]


def test_where_the_last_save_succeeds_the_one_before_need_not(store, tmp_path, monkeypatch):
    checkpoint = {"save_every": 3, "on_save_error": "stop", "asynchronous": True}
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 4}, checkpoint=checkpoint)
    is_busy = saver.Saver.is_busy
    monkeypatch.setattr(saver.Saver, "is_busy", property(lambda self: is_busy.fget(self) or self.is_pending))
    fail_writes_of(3, 99, monkeypatch)
    train_on_ranks(config, 1)
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000004"]


def test_waits_that_come_once_are_sections_of_their_own_to_the_watchdog(store, tmp_path, monkeypatch):
    """The last asynchronous save takes as long as the disk does, and closing as long as a tracker's last upload."""
    checkpoint = {"save_every": 2, "asynchronous": True}
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2}, checkpoint=checkpoint)
    enter, phases = Vitals.enter, tmp_path / "phases"

    def noted(self, section, detail="", step=None):
        with open(phases, "a") as file:
            file.write(f"{section}: {detail}\n")
        enter(self, section, detail, step)

    monkeypatch.setattr(Vitals, "enter", noted)
    train_on_ranks(config, 1)
    assert phases.read_text().splitlines()[-5:] == [
        "save: ", "other: ", "save: files", "other: ", "other: closing",
    ]  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_on_its_way_is_finished_when_bad_numbers_end_the_run(store, tmp_path, monkeypatch, capfd, fails):
    trainer = {"steps": 9, "max_skipped_steps": 2}
    checkpoint = {"save_every": 2, "asynchronous": True, "on_save_error": "stop"}
    if fails:
        fail_writes_of(2, 99, monkeypatch)
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer=trainer, checkpoint=checkpoint)
    summed_loss, steps = Engine._summed_loss, []

    def poisoned(*args):
        steps.append(1)
        return summed_loss(*args) * (math.nan if len(steps) > 2 * 8 // config.trainer.micro_batch_size else 1)

    monkeypatch.setattr(Engine, "_summed_loss", poisoned)
    monkeypatch.setattr(saver.Saver, "is_busy", property(lambda self: self.is_pending))
    assert spawn_ranks(lambda place: train(preflight(config), place), 1) == MegaliteError.exit_code
    assert "2 steps in a row were skipped" in capfd.readouterr().err
    assert (tmp_path / "run/checkpoints/step_00000002/manifest.json").is_file() is not fails


def test_the_last_save_must_succeed(store, tmp_path, monkeypatch, capfd):
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2})
    fail_writes_of(2, 99, monkeypatch)
    assert spawn_ranks(lambda place: train(preflight(config), place), 1) == CheckpointError.exit_code
    assert "No space left on device" in capfd.readouterr().err


def test_a_disk_too_small_for_a_checkpoint_is_said_before_the_first_step(store, tmp_path, monkeypatch, capfd):
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert spawn_ranks(lambda place: train(preflight(config), place), 1) == 5
    assert re.search(r"run_dir: a checkpoint takes 0\.00 GB, the disk of .* 0\.00 GB free", capfd.readouterr().err)
    monkeypatch.undo()
    train_on_ranks(config, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step_00000002").iterdir())

    def rank_main(place):
        said = []
        monkeypatch.setattr(
            "megalite.trainer.checkpoint_bytes", lambda engine: said.append(checkpoint_bytes(engine)) or 0
        )
        train(preflight(config), place)
        assert said == [pytest.approx(size, rel=0.1)]

    assert spawn_ranks(rank_main, 1) == 0


def test_a_checkpoint_with_nan_is_never_published(store, tmp_path, monkeypatch, capfd):
    """One rank's moment of one parameter goes bad after the last step: gradients and loss were fine."""
    get_fragment = saver.get_fragment

    def spoilt(engine, parameter, kind):
        start, value = get_fragment(engine, parameter, kind)
        if kind == "exp_avg" and parameter is engine.parameters()[3][1] and len(value):
            value = value.clone()
            value[5] = math.nan
        return start, value

    monkeypatch.setattr(saver, "get_fragment", spoilt)
    config = tiny_config(tmp_path / "run", store, model=SMALL, trainer={"steps": 2})
    assert spawn_ranks(lambda place: train(preflight(config), place), 2) == CheckpointError.exit_code
    assert re.search(r"not saved: exp_avg of \S+ of 1 tensors holds inf or nan", capfd.readouterr().err)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_batch_with_nan_is_skipped_on_all_ranks_and_named(store, tmp_path, monkeypatch, zero_stage):
    """NaN in one rank's loss of one step: every rank's weights stay, and the log names what the batch held."""
    summed_loss = Engine._summed_loss
    calls = [0]

    def spoilt(engine, *args):
        calls[0] += 1
        bad = calls[0] == 3 and engine.mesh.rank == 1
        return summed_loss(engine, *args) * (math.nan if bad else 1.0)

    def config(name, **changes):
        return tiny_config(
            tmp_path / name,
            store,
            model=SMALL,
            engine={"zero_stage": zero_stage},
            trainer={"steps": 3, "micro_batch_size": 4},
            checkpoint={"save_every": 1, "keep": 9},
            **changes,
        )

    monkeypatch.setattr(Engine, "_summed_loss", spoilt)
    rows = train_on_ranks(config("run"), 2)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1]
    digests = [
        {entry.name: entry.digest for entry in read_manifest(tmp_path / f"run/checkpoints/step_0000000{n}").files}
        for n in (2, 3)
    ]
    assert digests[0] == digests[1], "the skipped step changed weights or moments"
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert re.search(r"step 3 was skipped: .* Its batch holds \d+ documents: words:\d+, .*skip_steps=\[\[3,3\]\]", log)


def test_steps_that_are_left_out(store, tmp_path):
    """The batch of step 2 is as if it had never been: the others see theirs, at their own learning rates."""

    def run(name, **data):
        config = tiny_config(
            tmp_path / name,
            store,
            model=SMALL,
            trainer={"steps": 5},
            data={"train": str(store), "sequence_length": 32} | data,
        )
        return train_on_ranks(config, 1)

    rows, whole = run("without", skip_steps=[[2, 3]]), run("whole")
    assert [row["step"] for row in rows] == [1, 4, 5]
    assert rows[0]["loss"] == whole[0]["loss"]
    assert rows[1]["loss"] != whole[3]["loss"]
    assert [row["learning_rate"] for row in rows] == [whole[step - 1]["learning_rate"] for step in (1, 4, 5)]
    assert rows[-1]["tokens_seen"] == whole[-1]["tokens_seen"]


def test_a_list_of_documents_given_at_a_resume(store, tmp_path):
    """All documents but one are skipped from step 2 on: what is left is that one's loss."""

    def config(name, **data):
        return tiny_config(
            tmp_path / name,
            store,
            model=SMALL,
            trainer={"steps": 4, "stop_after": 2 if not data else 4},
            data={"train": str(store), "sequence_length": 32} | data,
        )

    before = train_on_ranks(config("run"), 1)
    rows = train_on_ranks(config("run", skip_documents=[f"words:{i}" for i in range(60)]), 1)
    assert rows[:2] == before
    assert [row["loss"] for row in rows[2:]] == [0.0, 0.0], "every label is of a skipped document"
