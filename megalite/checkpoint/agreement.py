"""What ranks tell each other around files, errors included, so that none waits for one that has gone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megalite.errors import CheckpointError, MegaliteError

T = TypeVar("T")


def on_rank_0(verb: str, call: Callable[[], T]) -> T:
    """`on_rank(0, ...)`."""
    return on_rank(0, verb, call)


def on_rank(rank: int, verb: str, call: Callable[[], T]) -> T:
    """Run `call`, which may `verb` a checkpoint, on `rank` alone and give its result to every rank; all call this.

    Its `CheckpointError` is raised on every rank alike, and an `OSError` as one.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == rank:
        try:
            outcome[0] = call()
        except CheckpointError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = (
                f"rank {rank} could not {verb} a checkpoint: {error}. Is the disk full, or the folder not yours?"
            )
    dist.broadcast_object_list(outcome, src=rank)
    result, problem = outcome
    if problem:
        raise CheckpointError(problem)
    return result


def gather_lists(own: list[T], problem: str | None, error: type[MegaliteError] = CheckpointError) -> list[T]:
    """The lists of all ranks, end to end. Raises `error` on every rank when any of them had a `problem`."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (own, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        raise error("; ".join(problems))
    return [item for part, _ in outcomes for item in part]
