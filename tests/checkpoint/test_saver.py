"""What a save writes is what DeepSpeed itself says the engine held, whatever goes on meanwhile, and whoever fails."""

import dataclasses
import functools
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from megalite.checkpoint import Counters, Saver, fragments, saver, writing
from megalite.checkpoint.engine_state import get_tensor, link_moments
from megalite.checkpoint_folder import newest_checkpoint
from megalite.checkpoint_format import KINDS, verify_checkpoint
from megalite.data.format import TokenStore
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.mesh import build_mesh
from megalite.models import gather_parameter
from megalite.objectives import Batch
from tests.ranks import run_ranks
from tests.runs import tiny_config, write_store

# 301 is divided by no number of ranks: each of them holds another part of the padding.
MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 301, "max_sequence_length": 32}
SCALE = {"ds_overrides": {"fp16": {"initial_scale_power": 8}}}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, ZeRO stage, precision, what is offloaded."""

    tensor: int
    data: int
    zero_stage: int
    context: int = 1
    precision: str = "fp32"
    offload: str = "none"

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}-dp{self.data}-cp{self.context}-zero{self.zero_stage}-{self.precision}"
        return sizes if self.offload == "none" else f"{sizes}-{self.offload}"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.data * self.context


LAYOUTS = [
    *(Layout(tensor, data, zero) for tensor, data in [(1, 2), (2, 2)] for zero in range(4)),
    *(Layout(2, 1, 0), Layout(2, 1, 1), Layout(2, 1, 3)),
    *(Layout(1, 1, 2, context=2), Layout(2, 1, 3, context=2)),
    *(Layout(1, 2, 1, precision="bf16"), Layout(1, 2, 2, precision="bf16"), Layout(2, 2, 3, precision="bf16")),
    *(Layout(1, 2, 1, precision="fp16"), Layout(1, 2, 3, precision="fp16")),
    *(Layout(1, 2, zero, offload="optimizer") for zero in (1, 2, 3)),
    *(Layout(1, 2, 3, precision="bf16", offload="parameters"), Layout(1, 2, 1, precision="bf16", offload="optimizer")),
]
# In `make test`: every stage, a tensor axis split and not, half precision, memory of the host.
QUICK = [
    *(Layout(1, 2, zero) for zero in (0, 3)),
    *(Layout(2, 2, zero) for zero in (0, 2, 3)),
    *(Layout(1, 2, 1, precision="bf16"), Layout(1, 2, 1, offload="optimizer")),
]
CASES = [pytest.param(layout, id=str(layout), marks=() if layout in QUICK else pytest.mark.slow) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


def build(layout: Layout, run_dir: Path, store: Path) -> Engine:
    """An engine after its first step."""
    get_accelerator().is_fp16_supported = lambda: True  # torch computes it in software
    engine = {"zero_stage": layout.zero_stage, "precision": layout.precision, "offload": layout.offload}
    config = tiny_config(
        run_dir,
        store,
        model=MODEL,
        parallel={"tensor": layout.tensor, "context": layout.context},
        engine=engine | (SCALE if layout.precision == "fp16" else {}),
    )
    built = Engine(config, build_mesh(config.parallel, torch.device("cpu")))
    built.init_weights()
    step(built, 0)
    return built


def step(engine: Engine, number: int) -> None:
    """One of them, whose numbers every tensor notices."""
    batches = []
    for seed in range(engine.config.trainer.global_batch_size // (2 * engine.mesh.data.size)):
        generator = torch.Generator().manual_seed(100 * number + 10 * engine.mesh.data.rank + seed)
        ids = torch.randint(MODEL["vocab_size"], (2, 33), generator=generator)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 32, dtype=torch.bool)))
    engine.train_step(batches, number, 0.01)


def set_up(engine: Engine, asynchronous: bool, file_bytes: int = 60_000, writers: Sequence[int] = ()) -> Saver:
    """A saver with many files, some of one tensor, so that every rank writes several."""
    writing.FILE_BYTES = file_bytes
    settings = tiny_config("unused", checkpoint={"asynchronous": asynchronous}).checkpoint
    engine.config = dataclasses.replace(engine.config, checkpoint=settings)
    return Saver(engine, Path(engine.config.run_dir), writers)


def held(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    """The logical tensors, by DeepSpeed's own collectives."""
    link_moments(engine)
    return {
        (kind, name): gather_parameter(get_tensor(engine, parameter, kind), parameter, engine.mesh).detach().clone()
        for name, parameter in engine.parameters()
        for kind in KINDS
    }


def saved(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Of the newest checkpoint, which is whole."""
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    files = verify_checkpoint(folder).files
    return {(file.kind, name): value for file in files for name, value in load_file(folder / file.name).items()}


def differing(found: dict, expected: dict) -> list[tuple[str, str]]:
    """Names of tensors that are not the same bits."""
    assert found.keys() == expected.keys()
    return [key for key in expected if not torch.equal(found[key].view(torch.int32), expected[key].view(torch.int32))]


def save_and_compare(layouts: list[Layout], folder: Path, store: Path) -> dict[Layout, list]:
    """On every rank: saves of each layout, at once, and while steps are taken; what they got wrong."""
    found = {}
    for layout in layouts:
        engine = build(layout, folder / str(layout), store)
        run_dir = Path(engine.config.run_dir)
        at_once, later = set_up(engine, asynchronous=False), set_up(engine, asynchronous=True)
        wrong: list = []
        expected = held(engine)
        at_once.save(Counters(step=1), {})
        wrong += differing(saved(run_dir), expected)
        dist.barrier()
        later._room.result()
        room = {name: copy.data_ptr() for name, copy in later._copies.items()}
        assert room.keys() == {file.name for file in later._files.plan}
        for round in (2, 4):  # the second from copies that were used before
            trained = threading.Event()
            write = later._files.write
            later._files.write = lambda *args, wait=trained, write=write: wait.wait() and write(*args)
            later.save(Counters(step=round), {})
            assert later.is_busy
            step(engine, round)
            trained.set()
            step(engine, round + 1)
            later.finish()
            wrong += differing(saved(run_dir), expected)
            moved = held(engine)
            wrong += [("did not move", key) for key in expected if torch.equal(moved[key], expected[key])]
            expected = moved
            del later._files.write
            dist.barrier()
        assert {name: copy.data_ptr() for name, copy in later._copies.items()} == room, "no save took fresh memory"
        found[layout] = wrong
        at_once.close()
        later.close()
    return found


@pytest.fixture(scope="module")
def wrongs(store, tmp_path_factory) -> Callable[[int, bool], list[dict]]:
    folder = tmp_path_factory.mktemp("saves")

    @functools.cache
    def of(world: int, quick: bool) -> list[dict]:
        """All layouts of one size, from the same ranks."""
        layouts = [layout for layout in LAYOUTS if layout.world == world and (layout in QUICK) == quick]
        return run_ranks(world, save_and_compare, layouts, folder, store)

    return of


@pytest.mark.parametrize("layout", CASES)
def test_what_is_saved_is_what_deepspeed_gathers_though_steps_go_on(layout, wrongs):
    assert [found[layout] for found in wrongs(layout.world, layout in QUICK)] == [[]] * layout.world


def save_without_the_store(run_dir: Path, store: Path) -> None:
    engine = build(Layout(1, 1, 1), run_dir, store)
    saver = set_up(engine, asynchronous=False)
    shutil.rmtree(store)
    saver.save(Counters(step=1), {})
    saver.close()


def test_a_store_that_is_gone_takes_no_checkpoint_with_it(tmp_path):
    """A disk of data breaks: what was learned from it is saved all the same."""
    store = write_store(tmp_path / "words")
    digest = TokenStore.open(store).digest
    run_ranks(1, save_without_the_store, tmp_path / "run", store)
    folder = newest_checkpoint(tmp_path / "run")
    assert folder is not None
    assert verify_checkpoint(folder).stores == [digest]


def no_memory(*args):
    raise MemoryError("none left")


def full_disk(*args):
    raise OSError(28, "No space left on device")


FAILURES = {
    "write": (writing, "_write_tensors", full_disk, "rank 1 could not write a checkpoint: .*No space left"),
    "room": (fragments.Exchange, "make_room", no_memory, "rank 1 could not do its part of a save: MemoryError"),
    "fragments": (saver.Saver, "_borrow", no_memory, "rank 1 could not do its part of a save: MemoryError"),
    "group": (fragments.Exchange, "receive", no_memory, "rank 1 could not do its part of a save: MemoryError"),
}


def fail_on_rank_1(folder: Path, store: Path) -> list[tuple[str, bool, str]]:
    """On every rank: saves in which rank 1 fails, each followed by one in which it does not."""
    fragments.TIMEOUT = timedelta(seconds=3)
    engine = build(Layout(1, 2, 1), folder / "run", store)
    found = []
    counters = Counters()
    for asynchronous in (False, True):
        under_test = set_up(engine, asynchronous)
        for name, (owner, attribute, failure, _) in FAILURES.items():
            if name == "fragments" and asynchronous:
                continue  # they are copied before anybody waits for them
            counters.step += 1
            works = getattr(owner, attribute)
            if engine.mesh.rank == 1:
                setattr(owner, attribute, failure)
            said = ""
            try:
                under_test.save(counters, {})
                under_test.finish()
            except CheckpointError as error:
                said = str(error)
            setattr(owner, attribute, works)
            dist.barrier()
            left = [path.name for path in (folder / "run/checkpoints").iterdir() if ".tmp" in path.name]
            assert left == []
            dist.barrier()
            under_test.save(counters, {})
            under_test.finish()
            assert differing(saved(folder / "run"), held(engine)) == []
            found.append((name, asynchronous, said))
        under_test.close()
    return found


def test_a_rank_that_fails_is_waited_for_by_none_and_the_next_save_is_whole(store, tmp_path):
    found = run_ranks(2, fail_on_rank_1, tmp_path, store)
    assert found[0] == found[1]
    assert len(found[0]) == 2 * len(FAILURES) - 1
    for name, _, said in found[0]:
        assert re.search(FAILURES[name][3], said), (name, said)
        assert ("rank 0" in said) == (name == "group"), "rank 0 was left waiting"
