"""What ranks tell each other around files, errors included, so that none waits for one that has gone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megalite.errors import CheckpointError

T = TypeVar("T")


def on_rank_0(verb: str, call: Callable[[], T]) -> T:
    """Run `call`, which may `verb` a checkpoint, on rank 0 alone and give its result to every rank; all call this.

    Its `CheckpointError` is raised on every rank alike, and an `OSError` as one.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = call()
        except CheckpointError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = f"rank 0 could not {verb} a checkpoint: {error}. Is the disk full, or the folder not yours?"
    dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome
    if problem:
        raise CheckpointError(problem)
    return result


def gather_lists(own: list[T], problem: str | None) -> list[T]:
    """The lists of all ranks, end to end. Raises `CheckpointError` on every rank when any of them had a `problem`."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (own, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        raise CheckpointError("; ".join(problems))
    return [item for part, _ in outcomes for item in part]
