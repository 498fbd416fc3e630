"""`megalite doctor`: is this machine fit to run? One line for each check, with the fix beside what is wrong."""

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megalite.config.compose import compose_config
from megalite.config.schema import DoctorConfig
from megalite.config.validate_commands import validate_doctor
from megalite.errors import EXIT_OK, EXIT_RESOURCE

from . import machine_checks, node_checks
from .machine_checks import Check

CHECKS: tuple[Callable[[DoctorConfig], Iterator[Check]], ...] = (
    machine_checks.check_python,
    machine_checks.check_packages,
    node_checks.check_variables,
    node_checks.check_all_reduce,  # before a device is touched: ranks are forked from this process
    machine_checks.check_device,
    machine_checks.check_stale_locks,
    machine_checks.check_ports,
    node_checks.check_interfaces,
    node_checks.check_host_name,
    node_checks.check_infiniband,
    node_checks.check_clock,
    machine_checks.check_disk,
    node_checks.check_run_dir,
    machine_checks.check_shared_memory,
    machine_checks.check_processor,
    machine_checks.check_open_files,
    machine_checks.check_compiler,
    machine_checks.check_secrets,
)
_MARKS = {"ok": ("ok", "green"), "warn": ("warning", "yellow"), "fail": ("failed", "bold red")}


def doctor(arguments: list[str]) -> int:
    """Look at the machine; returns 0 when nothing failed (warnings may stand), else EXIT_RESOURCE."""
    config = compose_config("doctor", DoctorConfig, arguments)
    validate_doctor(config)
    checks = [check for function in CHECKS for check in function(config)]
    console = Console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        _print_check(console, check, width)
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"{len(checks)} checks: {failed} failed, {warned} warnings", highlight=False)
    return EXIT_RESOURCE if failed else EXIT_OK


def _print_check(console: Console, check: Check, width: int) -> None:
    """The check's line, and below it the fix, which is never broken over lines: it is there to be copied."""
    line = Table.grid(Column(width=7), Column(width=width), Column(overflow="fold", ratio=1), padding=(0, 2, 0, 0))
    mark, colour = _MARKS[check.status]
    line.add_row(Text(mark, colour), Text(check.name), Text(check.found))
    console.print(line)
    if check.fix:
        console.print(Text(" " * 9).append("fix: ", colour).append(check.fix), soft_wrap=True)
