"""`megalite train -m`: a training for every combination of values, or for those that Optuna chooses; their table."""

from collections.abc import Sequence
from contextlib import closing

from megalite.config.frozen import config_yaml
from megalite.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, ResourceError
from megalite.guard.lock import RunLock
from megalite.guard.signals import ending_at_once
from megalite.log import get_logger

from .array import describe_array, start_array
from .plan import Job, Sweep, metric_of, plan_grid, read_command
from .run import run_side_by_side, slots_of
from .search import Search, plan_search
from .state import is_finished, row_of
from .table import best_of, show

log = get_logger(__name__)


def sweep(arguments: Sequence[str]) -> int:
    """Run what is not finished yet and show all; returns 0 when all is, 75 when a signal stopped it, else a failure's.

    `arguments`: those of `megalite train` without -m.
    """
    with ending_at_once(EXIT_REQUEUE):
        plan = read_command([argument for argument in arguments if argument != "--cfg"])
        jobs = [plan_search(plan)] if plan.settings.trials else plan_grid(plan)
        metric_of(plan.settings, jobs[0].training.config)  # or its name would be found wrong after all trainings
        if "--cfg" in arguments:
            print("---\n".join(config_yaml(job.training.config) for job in jobs), end="")
            return EXIT_OK
        if jobs[0].training.config.launch.dry_run:
            _describe(plan, jobs)
            return EXIT_OK
    try:
        return search(plan, jobs[0]) if plan.settings.trials else grid(plan, jobs)
    except OSError as error:
        raise ResourceError(f"sweep.dir: {plan.directory} cannot be written: {error}") from None


def grid(plan: Sweep, jobs: Sequence[Job]) -> int:
    """Run every combination that is not finished."""
    config = jobs[0].training.config
    with closing(RunLock(plan.directory, key="sweep.dir", work="sweep", advice="sweep.name")):
        left = [job for job in jobs if not is_finished(job)]
        log.info("sweep %s: %d trainings, %d of them finished", plan.name, len(jobs), len(jobs) - len(left))
        code = EXIT_OK
        if left and config.launch.name == "slurm":
            code = start_array(plan, left)
        elif left:
            most = max(job.training.ranks_per_node for job in left)
            slots = slots_of(plan.settings.parallel or 1, most)
            code = run_side_by_side(Grid(left), slots, plan.directory)
        show(plan, [row_of(job, plan.directory) for job in jobs], metric_of(plan.settings, config))
    return code


def search(plan: Sweep, job: Job) -> int:
    """Go on to `sweep.trials` trials in all; others may work on the same ones. `job`: one of them."""
    config = job.training.config
    trials = Search(plan, job)
    left = int(plan.settings.trials or 0) - trials.num_ended
    log.info("sweep %s: %d trials, %d of them ended", plan.name, plan.settings.trials, trials.num_ended)
    code = EXIT_OK
    if left > 0 and config.launch.name == "slurm":
        code = start_array(plan, [job], workers=min(left, plan.settings.parallel or 1))
    elif left > 0:
        slots = slots_of(plan.settings.parallel or 1, config.launch.nproc_per_node)
        code = run_side_by_side(trials, slots, plan.directory) or trials.problem
    rows, metric = trials.rows(), metric_of(plan.settings, config)
    show(plan, rows, metric)
    if code != EXIT_OK:
        return code
    # Where the command itself trains, what has not ended yet is another worker's.
    was_awaited = left > 0 and config.launch.name == "slurm" and config.launch.wait
    is_short = was_awaited and trials.num_ended < int(plan.settings.trials or 0)
    failed = [row for row in rows if row.state == "failed"]
    is_in_vain = bool(failed) and best_of(rows, metric, plan.settings.direction) is None
    return EXIT_FAILURE if is_short or is_in_vain else EXIT_OK


class Grid:
    """Hands out the trainings in their order; see `run.Source`."""

    def __init__(self, jobs: Sequence[Job]):
        """Nothing is started."""
        self._waiting = list(jobs)

    @property
    def is_empty(self) -> bool:
        """Whether all have been handed out."""
        return not self._waiting

    def next(self) -> Job | None:
        """The next one."""
        return self._waiting.pop(0) if self._waiting else None

    def is_hopeless(self, job: Job) -> bool:
        """None is stopped early."""
        return False

    def ended(self, job: Job, code: int) -> int:
        """What counts is how each ended."""
        return code


def _describe(plan: Sweep, jobs: Sequence[Job]) -> None:
    launch = jobs[0].training.config.launch
    if plan.settings.trials:
        print(f"{plan.settings.trials} trials in {plan.directory}: {' '.join(one.line for one in plan.dimensions)}")
    else:
        print(f"{len(jobs)} trainings in {plan.directory}:")
        print("\n".join(f"{row.label}  {row.state}" for row in (row_of(job, plan.directory) for job in jobs)))
    if launch.name == "slurm":
        left = [job for job in jobs if not is_finished(job)]
        print(describe_array(plan, left or jobs, (plan.settings.parallel or 1) if plan.settings.trials else None))
