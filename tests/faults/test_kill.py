"""R1: whatever is killed, and whenever, the same command goes on and ends with the same bits."""

import os
import random
import time

import pytest

from megalite.checkpoint_folder import list_checkpoints
from tests.faults.supervisor import draw_kill, outcome, run_once
from tests.runs import tiny_config, write_store

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}
# (tensor, world size, ZeRO stage, precision, accumulation, asynchronous)
GRID = [
    (tensor, world, zero, precision, accumulation, asynchronous)
    for tensor, world in ((1, 2), (2, 2), (2, 4))
    for zero, precision in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    for accumulation in (1, 3)
    for asynchronous in (False, True)
]
STEPS, SAVE_EVERY = 6, 2
FIRST_SEED = int(os.environ.get("MEGALITE_TEST_SEED", 20260101))


def check(seed, folder):
    """One draw: a layout, one to three kills, the end; returns what was killed where."""
    source = random.Random(seed)
    tensor, world, zero, precision, accumulation, asynchronous = source.choice(GRID)
    store = write_store(folder / "store")
    data_size = world // tensor

    def config(name):
        return tiny_config(
            folder / name / "run",
            store,
            model=SMALL | {"dropout": 0.1},
            parallel={"tensor": tensor},
            engine={"zero_stage": zero, "precision": precision},
            trainer={"steps": STEPS, "global_batch_size": 2 * data_size * accumulation, "micro_batch_size": 2},
            checkpoint={"save_every": SAVE_EVERY, "asynchronous": asynchronous},
        )

    for name in ("straight", "killed"):
        (folder / name).mkdir()
    began = time.monotonic()
    assert run_once(config("straight"), world) == 0, (folder / "straight/stderr.txt").read_text()
    seconds = time.monotonic() - began
    kills, deaths = [draw_kill(source, world, seconds) for _ in range(source.randint(1, 3))], 0
    for kill in kills:
        before = [path.name for path in list_checkpoints(folder / "killed/run/checkpoints")]
        code = run_once(config("killed"), world, kill)
        deaths += code != 0
        after = [path.name for path in list_checkpoints(folder / "killed/run/checkpoints")]
        assert not before or after, f"{kill}: the checkpoints {before} are gone"
        if code == 0:
            break  # it came to its end first
    assert run_once(config("killed"), world) == 0, (folder / "killed/stderr.txt").read_text()
    found, expected = outcome(folder / "killed/run"), outcome(folder / "straight/run")
    place = f"seed {seed}: {tensor=} {world=} {zero=} {precision=} {accumulation=} {asynchronous=} {kills}"
    assert found == expected, place
    assert set(found[0]) == set(range(1, STEPS + 1)), place
    leftovers = [path.name for path in (folder / "killed/run/checkpoints").iterdir() if ".tmp" in path.name]
    assert not leftovers, f"{place}: {leftovers}"
    return deaths


@pytest.mark.parametrize("draw", range(4))
def test_killed_anywhere_it_continues_bit_for_bit(draw, tmp_path):
    check(FIRST_SEED + draw, tmp_path)


@pytest.mark.soak
def test_killed_anywhere_two_hundred_times(tmp_path, pytestconfig):
    """Goes on with its own count when it is started again."""
    passed, deaths = pytestconfig.cache.get("megalite/kills", [0, 0])
    for draw in range(passed, 200):
        folder = tmp_path / str(draw)
        folder.mkdir()
        deaths += check(FIRST_SEED + draw, folder)
        pytestconfig.cache.set("megalite/kills", [draw + 1, deaths])
        print(f"draw {draw + 1} of 200, {deaths} deaths", flush=True)
    pytestconfig.cache.set("megalite/kills", [0, 0])
    assert deaths > 150, "too many runs came to their end before the kill"
