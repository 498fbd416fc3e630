"""Hosts without a common run directory: here ranks of one machine, the first two and the last two share one each.

In tests/cluster they are hosts, with another disk under the same path.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megalite.checkpoint import Counters, agree_on_checkpoint, hosts, load_checkpoint
from megalite.checkpoint_folder import create_temporary, list_checkpoints, newest_checkpoint
from megalite.checkpoint_format import FileEntry, verify_checkpoint, write_manifest
from megalite.config.schema import TrainConfig
from megalite.engine import Engine
from megalite.errors import MegaliteError, ResourceError
from megalite.guard.lock import RunLock
from megalite.launch.spawn import spawn_ranks
from megalite.metrics.jsonl import read_metrics
from megalite.sharing import find_sharing
from megalite.train import train
from tests.checkpoint.test_saver import Layout, build, differing, full_disk, held, saved, set_up
from tests.ranks import run_ranks
from tests.runs import tiny_config, train_on_ranks, write_store
from tests.test_checkpoint_format import save

SMALL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "max_sequence_length": 32}
NAMED = "x/step_00000007"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


def run_dirs(folder: Path) -> tuple[Path, Path]:
    """Of the host that rank 0 is on, and of the other one."""
    return folder / "a/run", folder / "b/run"


def own(folder: Path) -> Path:
    return run_dirs(folder)[dist.get_rank() // 2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def save_begun_with(run_dir: Path, step: int, resume: str, steps: int = 100) -> None:
    """A checkpoint of a run that was started with this `checkpoint.resume`."""
    folder = save(run_dir / "checkpoints", step)
    config = {"checkpoint": {"resume": resume}, "trainer": {"steps": steps}}
    write_manifest(folder, dataclasses.replace(verify_checkpoint(folder), config=config))


@dataclasses.dataclass(frozen=True)
class Case:
    """What stands in both run directories, and what is to come of it: (host, step) of what all go on from."""

    a: Callable[[Path], object] = lambda run_dir: None
    b: Callable[[Path], object] = lambda run_dir: None
    chosen: tuple[str, int] | None = None
    error: str = ""
    resume: str = "auto"
    is_sent: bool = True


def steps(*numbers: int, content: bytes = b"tensors") -> Callable[[Path], object]:
    return lambda run_dir: [save(run_dir / "checkpoints", step, content) for step in numbers]


def damaged(*numbers: int) -> Callable[[Path], object]:
    return lambda run_dir: [damage(save(run_dir / "checkpoints", step)) for step in numbers]


def torn(run_dir: Path) -> None:
    temporary = create_temporary(run_dir / "checkpoints", 5)
    (temporary / "weight-00000.safetensors").write_bytes(b"half")


CASES = {
    "none has any": Case(is_sent=False),
    "the other has none": Case(steps(3, 4), chosen=("a", 4)),
    "both have it": Case(steps(4), steps(4), chosen=("a", 4), is_sent=False),
    "the newest is on the other": Case(steps(3), steps(4), chosen=("b", 4)),
    "only the other has any": Case(b=steps(4), chosen=("b", 4)),
    "the copy is damaged": Case(steps(4), damaged(4), chosen=("a", 4)),
    "an older copy": Case(steps(3, 4), steps(3), chosen=("a", 4)),
    "the first host's newest is damaged": Case(lambda d: (steps(1)(d), damaged(3)(d)), steps(2), chosen=("b", 2)),
    "all are damaged": Case(damaged(4), damaged(3), error="no whole checkpoint .*no whole checkpoint", is_sent=False),
    "one step, two contents": Case(steps(4), steps(4, content=b"other"), chosen=("a", 4)),
    "a torn copy": Case(steps(4), torn, chosen=("a", 4)),
    "a path that one host has": Case(b=lambda d: save(d.parent / "x", 7), resume=NAMED, chosen=("b", 7)),
    "a path that both have": Case(
        *[lambda d: save(d.parent / "x", 7)] * 2, resume=NAMED, chosen=("a", 7), is_sent=False
    ),
    "a path that none has": Case(steps(4), resume=NAMED, error="is not a checkpoint", is_sent=False),
    "never": Case(steps(4), steps(5), resume="never", is_sent=False),
    "never, and begun so": Case(
        steps(3), lambda d: save_begun_with(d, 4, "never"), resume="never", chosen=("b", 4)
    ),
    "never, begun so and at its end": Case(
        lambda d: save_begun_with(d, 4, "never", steps=4), lambda d: save_begun_with(d, 3, "never", steps=4),
        resume="never", is_sent=False,
    ),
}  # fmt: skip


def agree(folder: Path, resume: str = "auto") -> tuple[str, str, int]:
    """What this rank finds below `folder`, or the error; and how often life was seen."""
    moves: list[int] = []
    try:
        run_dir = own(folder)
        found = agree_on_checkpoint(resume, run_dir, find_sharing(run_dir), lambda: moves.append(1))
    except MegaliteError as error:
        return "", f"{type(error).__name__}: {error}", len(moves)
    finally:
        dist.barrier()
    return str((Path.cwd() / found).relative_to(folder)) if found else "", "", len(moves)


def agree_in_all(folder: Path) -> dict[str, tuple[str, str, int]]:
    """On every rank."""
    outcomes = {}
    for name, case in CASES.items():
        here = folder / name
        if dist.get_rank() in (0, 2):
            own(here).mkdir(parents=True)
            (case.b if dist.get_rank() else case.a)(own(here))
        dist.barrier()
        os.chdir(own(here).parent)  # what a relative path means differs, as on hosts
        outcomes[name] = agree(here, case.resume)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[Path, list[dict[str, tuple[str, str, int]]]]:
    folder = tmp_path_factory.mktemp("hosts")
    return folder, run_ranks(4, agree_in_all, folder)


@pytest.mark.parametrize("name", CASES)
def test_all_go_on_from_the_newest_that_any_host_has(name, outcomes):
    case, folder = CASES[name], outcomes[0] / name
    found, errors, moves = zip(*[of_rank[name] for of_rank in outcomes[1]], strict=True)
    assert len(set(errors)) == 1, "every rank hears the same"
    assert re.fullmatch(f"CheckpointError: .*{case.error}.*" if case.error else "", errors[0])
    assert all(moves) == any(moves) == case.is_sent
    assert not list(folder.glob("*/run/*/*.tmp-*")), "nothing is left half written"
    assert not list(folder.glob("*/run/.ranks-*"))
    if case.chosen is None:
        assert set(found) == {""}
        return
    source, step = case.chosen
    is_named = case.resume == NAMED
    original = NAMED if is_named else f"run/checkpoints/step_{step:08d}"
    copy = f"run/received/step_{step:08d}" if is_named else original
    places = [f"{host}/{copy if case.is_sent and host != source else original}" for host in "aabb"]
    assert list(found) == places
    assert contents(folder / places[0]) == contents(folder / places[2])
    assert verify_checkpoint(folder / places[0]).step == step
    assert contents(folder / places[0])["weight-00000.safetensors"] == b"tensorsweight"


def refuse(folder: Path) -> list[list[str]]:
    """On every rank: a disk of the second host that has no room, that takes no file, that gives back other bytes."""
    hosts._BLOCK_BYTES = 7  # many blocks, the last one shorter
    said = []
    if dist.get_rank() == 0:
        save(own(folder) / "checkpoints", 4)
    verify, usage = hosts.verify_file, shutil.disk_usage

    def spoil(path: Path, entry: FileEntry) -> None:
        damage(path)
        verify(path, entry)

    for owner, attribute, failure in (
        (shutil, "disk_usage", lambda path: usage(path)._replace(free=5)),
        (os, "fsync", full_disk),
        (hosts, "verify_file", spoil),
        (hosts, "commit", full_disk),
    ):
        works = getattr(owner, attribute)
        if dist.get_rank() == 2:
            setattr(owner, attribute, failure)
        said.append(agree(folder)[1])
        setattr(owner, attribute, works)
        left = list(run_dirs(folder)[1].glob("checkpoints/*"))
        assert left == [], "nothing is left of it"
        dist.barrier()
    assert agree(folder)[1] == ""
    return said


def test_a_disk_that_refuses_is_heard_of_on_every_rank_and_leaves_nothing(tmp_path):
    said = run_ranks(4, refuse, tmp_path)
    assert said == [said[0]] * 4
    room, write, other_bytes, name = said[0]
    host = socket.gethostname()
    assert re.match(rf"ResourceError: {host}: run_dir: a checkpoint takes 0.00 GB, the disk of .*/b/run has 0", room)
    assert re.match(rf"CheckpointError: {host}: .*No space left on device", write)
    assert re.match(rf"CheckpointError: {host}: .*its digest is .*, the manifest says", other_bytes)
    assert re.match(rf"CheckpointError: {host}: .*No space left on device", name)
    assert contents(tmp_path / "a/run/checkpoints/step_00000004") == contents(
        tmp_path / "b/run/checkpoints/step_00000004"
    )


def save_and_go_on(folder: Path, store: Path) -> tuple[list, list[int], list[str]]:
    """On every rank: what a save of tensor 2 x data 2 got wrong, who wrote it, and what was loaded wrong."""
    engine = build(Layout(2, 2, 1), own(folder), store)
    sharing = find_sharing(own(folder))
    saver = set_up(engine, asynchronous=False, writers=sharing.with_rank_0)
    writers = sorted({file.writer for file in saver._files.plan})
    expected = held(engine)
    saver.save(Counters(step=1), {})
    saver.close()
    assert newest_checkpoint(run_dirs(folder)[1]) is None, "it is whole on the first host alone"
    dist.barrier()
    found = agree_on_checkpoint("auto", own(folder), sharing)
    wrong = differing(saved(own(folder)), expected)
    again = Engine(engine.config, engine.mesh)
    again.init_weights()
    assert load_checkpoint(again, found).step == 1
    return wrong + differing(held(again), expected), writers, [str(found.relative_to(folder))]


def test_a_save_is_whole_on_the_first_host_and_loaded_bit_by_bit_on_both(store, tmp_path):
    ranks = run_ranks(4, save_and_go_on, tmp_path, store)
    assert [wrong for wrong, _, _ in ranks] == [[]] * 4
    assert [writers for _, writers, _ in ranks] == [[0, 1]] * 4
    assert [found for _, _, [found] in ranks] == [f"{host}/run/checkpoints/step_00000001" for host in "aabb"]


def train_on_hosts(config: TrainConfig, folder: Path, order: str) -> int:
    """A life whose rank r is on the host called `order[r]`; returns the exit code."""

    def rank_main(place) -> None:
        os.chdir(folder / order[place.rank])  # run_dir is relative
        train(config, place)

    return spawn_ranks(rank_main, len(order))


def test_a_run_goes_on_whichever_host_comes_first(store, tmp_path, capfd):
    """Five lives, the second led by the other host, the last from an older step: the numbers of one directory."""
    trainer = {"steps": 8, "micro_batch_size": 4}
    config = tiny_config("run", store, model=SMALL, trainer=trainer, checkpoint={"keep": 1})
    straight = [row["loss"] for row in train_on_ranks(dataclasses.replace(config, run_dir=str(tmp_path / "one")), 2)]

    def life(order: str, stop_after: int, resume: str = "auto") -> list[float]:
        stopping = dataclasses.replace(config.trainer, stop_after=stop_after)
        resuming = dataclasses.replace(config.checkpoint, resume=resume)
        code = train_on_hosts(dataclasses.replace(config, trainer=stopping, checkpoint=resuming), tmp_path, order)
        assert code == 0
        return [row["loss"] for row in read_metrics(tmp_path / order[0] / "run/metrics.jsonl")]

    for host in "ab":
        (tmp_path / host).mkdir()
    assert life("ab", 2) == straight[:2]
    warned = capfd.readouterr().err
    assert f"is not that of {socket.gethostname()} for rank 1 on {socket.gethostname()}: checkpoints and" in warned
    assert steps_of(tmp_path / "a") == [2]
    assert steps_of(tmp_path / "b") == []
    assert life("ba", 4) == straight[2:4]
    assert f"{socket.gethostname()} has no checkpoint, {socket.gethostname()} step_00000002" in capfd.readouterr().err
    assert steps_of(tmp_path / "b") == [4]
    assert life("ab", 6) == straight[:2] + straight[4:6]
    assert (steps_of(tmp_path / "a"), steps_of(tmp_path / "b")) == ([6], [4])
    assert life("ab", 7)[-1:] == straight[6:7]
    assert (steps_of(tmp_path / "a"), steps_of(tmp_path / "b")) == ([7], [6]), "older copies are removed"
    assert life("ab", 8, resume=str(tmp_path / "b/run/checkpoints/step_00000006"))[-2:] == straight[6:]
    assert steps_of(tmp_path / "b") == [6]
    for host in "ab":
        written = {path.name for path in (tmp_path / host / "run").iterdir()}
        assert {"config.yaml", "ds_config.json", "logs", "checkpoints", "run.lock"} <= written


def steps_of(host: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(host / "run/checkpoints")]


def test_going_back_sets_aside_what_is_newer_on_every_host(store, tmp_path):
    config = tiny_config("run", store, model=SMALL, trainer={"steps": 2, "micro_batch_size": 4})
    for host, step in (("a", 5), ("b", 7)):
        (tmp_path / host).mkdir()
        save(tmp_path / host / "run/checkpoints", step)
    never = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume="never"))
    assert train_on_hosts(never, tmp_path, "ab") == 0
    assert (steps_of(tmp_path / "a"), steps_of(tmp_path / "b")) == ([2], [])
    left = {path.name[:24] for path in (tmp_path / "b/run/checkpoints").iterdir()}
    assert left == {"superseded-step_00000007", "latest"}


def test_each_directory_has_a_lock(store, tmp_path, capfd):
    config = tiny_config("run", store, model=SMALL, trainer={"steps": 2, "micro_batch_size": 4})
    for host in "ab":
        (tmp_path / host).mkdir()
    with contextlib.closing(RunLock(tmp_path / "b/run")):
        assert train_on_hosts(config, tmp_path, "ab") == ResourceError.exit_code
    printed = capfd.readouterr().err
    assert printed.count("run_dir: run is in use by another training") == 1, "all ranks have the same words"
    assert "Traceback" not in printed


def look(folder: Path) -> tuple:
    rank = dist.get_rank()
    sharing = find_sharing(folder / "abac"[rank])
    fault = "" if rank else "file"
    (folder / "file").touch()
    try:
        find_sharing(folder / fault / "d")
    except ResourceError as error:
        fault = str(error)
    return sharing.firsts, sharing.is_first, sharing.is_whole, sharing.with_rank_0, fault


def test_ranks_find_out_who_shares_a_directory(tmp_path):
    found = run_ranks(4, look, tmp_path)
    assert [of_rank[0] for of_rank in found] == [(0, 1, 0, 3)] * 4
    assert [of_rank[1] for of_rank in found] == [True, True, False, True]
    assert {of_rank[2] for of_rank in found} == {False}
    assert found[0][3] == [0, 2]
    for *_, error in found:
        assert re.match(r"run_dir: \S+ cannot write and read a file in .*Not a directory", error)
