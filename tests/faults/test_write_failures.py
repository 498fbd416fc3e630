"""R4: whichever call of a save the disk refuses, what was saved before stays, and nothing half-written is seen."""

import errno
import os
import re
import resource
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite import checkpoint_folder, checkpoint_format, tensor_file
from megalite.checkpoint import Counters, Saver
from megalite.checkpoint_folder import commit, create_temporary, list_checkpoints, newest_checkpoint
from megalite.checkpoint_format import read_manifest, verify_checkpoint
from megalite.config.schema import CheckpointConfig
from megalite.data import files
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.guard.goodput import GoodputClock, read_lives
from megalite.mesh import build_mesh
from tests.faults.supervisor import outcome, run_once
from tests.ranks import run_ranks
from tests.runs import tiny_config, write_store

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


class Disk:
    """Counts a process's calls to the disk while it is watched, and refuses one of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._refused: int | None = None
        self._number = 0
        self._watches = False
        for module in (tensor_file, checkpoint_format):
            module.open = self._open
        for name in ("fsync", "rename", "replace", "mkdir"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        files.exchange = self._counted("exchange", files.exchange)

    def watch(self, refused: int | None = None, number: int = 0) -> None:
        """From now on; `refused`: the call, from 0, that fails with this error."""
        self.calls, self._refused, self._number, self._watches = [], refused, number, True

    def leave(self) -> None:
        """No more."""
        self._watches = False

    def call(self, name: str) -> None:
        """Here is a call."""
        if self._watches:
            self.calls.append(name)
            if len(self.calls) - 1 == self._refused:
                raise OSError(self._number, os.strerror(self._number))

    def _counted(self, name, function):
        def counted(*args, **kwargs):
            self.call(name)
            return function(*args, **kwargs)

        return counted

    def _open(self, path, mode="r", **kwargs):
        file = open(path, mode, **kwargs)  # noqa: SIM115  its caller closes it
        return _Watched(file, self) if mode == "wb" else file


class _Watched:
    """A file whose writes are calls."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        self._disk.call("write")
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def sample(calls: list[str], wanted: int) -> list[int]:
    """Calls to refuse: all that are no writes, and some that are, among them the last two (the manifest, latest)."""
    writes = [number for number, name in enumerate(calls) if name == "write"]
    step = max(1, len(writes) // wanted)
    return sorted({*writes[::step], *writes[-2:], *(n for n, name in enumerate(calls) if name != "write")})


def refuse_calls(run_dir: str, store: str, asynchronous: bool, writes: int) -> list[dict]:
    """On every rank: a save for each call of it, of which that call fails; what came of it, as rank 0 sees it."""
    config = tiny_config(
        run_dir,
        store,
        model=SMALL,
        parallel={"tensor": 2},
        checkpoint={"asynchronous": asynchronous},
        trainer={"micro_batch_size": 4},
    )
    engine = Engine(config, build_mesh(config.parallel, torch.device("cpu")))
    engine.init_weights()
    saver, disk, counters = Saver(engine, Path(run_dir)), Disk(), Counters(step=1)
    checkpoints = Path(run_dir) / "checkpoints"

    def save() -> str:
        try:
            saver.save(counters, {})
            saver.finish()
        except CheckpointError as error:
            return str(error)
        finally:
            disk.leave()
        return ""

    def plan(again: bool) -> list[tuple[int, int, str]]:
        """(rank, call, its name), after a save that is only counted."""
        counters.step += not again
        disk.watch()
        assert save() == ""
        calls: list[list[str]] = [[], []]
        dist.all_gather_object(calls, disk.calls)
        return [(rank, number, calls[rank][number]) for rank in range(2) for number in sample(calls[rank], writes)]

    found = []
    assert save() == ""
    for again in (False, True):  # a step that is not saved yet, and one that is, which is replaced
        for rank, number, name in plan(again):
            before = newest_checkpoint(Path(run_dir))
            counters.step += not again
            refusal = ERRORS[len(found) % len(ERRORS)]
            disk.watch(number if engine.mesh.rank == rank else None, refusal)
            said = save()
            dist.barrier()
            after = newest_checkpoint(Path(run_dir))
            for folder in list_checkpoints(checkpoints):
                verify_checkpoint(folder)
            found.append(
                {
                    "call": (rank, number, name, again),
                    "error": os.strerror(refusal),
                    "said": said,
                    "before": before.name,
                    "after": after.name,
                    "is new": after.name == f"step_{counters.step:08d}",
                    "left": sorted(path.name for path in checkpoints.iterdir()),
                    "files": len(list(after.iterdir())),
                }
            )
            dist.barrier()
            assert save() == "", "the disk is well again"
            assert not [path for path in checkpoints.iterdir() if ".tmp" in path.name]
            dist.barrier()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    counters.step += 1
    said = save()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert newest_checkpoint(Path(run_dir)).name == f"step_{counters.step - 1:08d}"
    assert save() == ""
    found.append({"limit": said})
    saver.close()
    return found


@pytest.mark.parametrize(
    ("asynchronous", "writes"),
    [(False, 2), pytest.param(False, 6, marks=pytest.mark.slow), pytest.param(True, 6, marks=pytest.mark.slow)],
)
def test_whichever_call_the_disk_refuses_nothing_is_lost(asynchronous, writes, store, tmp_path):
    ranks = run_ranks(2, refuse_calls, str(tmp_path / "run"), str(store), asynchronous, writes)
    limit = [found.pop()["limit"] for found in ranks]
    assert re.search(r"rank \d could not write a checkpoint: .*File too large: '.*\.safetensors'", limit[0])
    found = ranks[0]
    assert [case["said"] for case in ranks[1]] == [case["said"] for case in found]
    assert len(found) >= {2: 20, 6: 40}[writes]
    names = {case["call"][2] for case in found}
    assert {"mkdir", "write", "fsync", "rename", "replace"} <= names
    refused = [case for case in found if case["said"]]
    assert len(refused) == len(found)
    for case in found:
        rank, _, name, _ = case["call"]
        assert f"rank {rank} could not write a checkpoint: " in case["said"], case
        assert case["error"] in case["said"], case
        assert re.search(r"It takes [\d,]+ bytes, the disk has [\d,]+ free", case["said"]), case
        if name in ("write", "fsync"):
            assert str(tmp_path / "run/checkpoints") in case["said"], case
        assert case["is new"] or case["after"] == case["before"], case
        assert case["files"] == 4, case
        # The name in `latest` comes after the checkpoint itself.
        assert not [name for name in case["left"] if ".tmp-" in name], case
    assert not all(case["is new"] for case in found)


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_checkpoint_that_is_replaced_is_there_at_any_moment(can_swap, tmp_path, monkeypatch):
    """The rename that fails is the one that gives the new one its name."""
    from tests.test_checkpoint_format import manifest, save

    old = save(tmp_path / "checkpoints", 5, b"old")
    digests = [entry.digest for entry in read_manifest(old).files]
    temporary = create_temporary(tmp_path / "checkpoints", 5)
    seen = []

    def look(call):
        def looked(*args):
            seen.append(old.is_dir())
            if call is exchange or Path(args[0]) == temporary:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args)

        return looked

    exchange = files.exchange
    monkeypatch.setattr(files, "exchange", look(exchange) if can_swap else lambda *_: False)
    monkeypatch.setattr(os, "rename", look(os.rename))
    with pytest.raises(OSError, match="Input/output"):
        commit(temporary, manifest(5))
    monkeypatch.undo()
    assert [entry.digest for entry in verify_checkpoint(old).files] == digests
    assert all(seen) or not can_swap
    save(tmp_path / "checkpoints", 5, b"new")
    assert [entry.digest for entry in verify_checkpoint(old).files] != digests


def test_latest_is_right_again_after_a_kill_between_the_two_names(tmp_path):
    from tests.test_checkpoint_format import save

    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        save(checkpoints, step)
    (checkpoints / "latest").write_text("step_00000001")
    (checkpoints / "latest.tmp").write_text("step_0000")
    checkpoint_folder.prune(checkpoints, CheckpointConfig())
    assert (checkpoints / "latest").read_text() == "step_00000002"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_a_full_disk_does_not_end_a_run_for_its_table(tmp_path):
    clock = GoodputClock(time.time(), tmp_path / "gone" / "goodput.jsonl")
    clock.mark(3)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()
    clock.mark(4)
    assert read_lives(tmp_path / "gone/goodput.jsonl")[0].last_step == 4


def test_directories_swap_names(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was {name}").touch()
    if not files.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "a/was b").exists()
    assert (tmp_path / "b/was a").exists()
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "c")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with little room."""
    folder = tmp_path / "limited/run"
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full(asynchronous, store, small_disk, tmp_path, capfd):
    """It has room for one checkpoint and a half: the last save must fail; with more room the run goes on as if not."""

    def config(run_dir):
        return tiny_config(
            run_dir,
            store,
            model=SMALL,
            trainer={"steps": 6, "micro_batch_size": 4},
            checkpoint={"save_every": 2, "asynchronous": asynchronous},
        )

    straight = tmp_path / "straight/run"
    straight.mkdir(parents=True)
    assert run_once(config(straight), 2) == 0
    size = sum(path.stat().st_size for path in newest_checkpoint(straight).iterdir())
    resize(small_disk, int(1.6 * size))
    assert run_once(config(small_disk), 2) == CheckpointError.exit_code
    errors = capfd.readouterr().err
    assert "No space left on device" in errors
    assert "training goes on to the next save" in errors
    assert newest_checkpoint(small_disk).name == "step_00000002"
    resize(small_disk, 10 * size)
    assert run_once(config(small_disk), 2) == 0, capfd.readouterr().err
    assert outcome(small_disk) == outcome(straight)
