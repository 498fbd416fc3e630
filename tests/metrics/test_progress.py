import io
import logging
import sys

import pytest
from rich.console import Console

from megalite.log import setup_logging
from megalite.metrics.progress import (
    BarProgress,
    LineProgress,
    build_progress,
    format_lines,
    human_count,
    human_time,
)

ROW = {
    "loss": 3.21456,
    "learning_rate": 2.95e-4,
    "grad_norm": 0.8123,
    "tokens_seen": 61440,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.5,
    "mfu": 0.4123,
    "memory_bytes": 2 * 2**30,
    "skipped_steps": 1,
}


def test_a_line_tells_everything_in_human_units():
    (line,) = format_lines(120, 400, ROW, num_devices=4, eta=140.0)
    assert line == (
        "step 120/400  loss 3.2146  lr 2.95e-04  grad norm 0.812  12.3k tok/s (3.09k/device)  MFU 41.2%  mem 2.00 GiB"
        "  skipped 1  ETA 2m 20s"
    )


def test_unknown_figures_are_left_out():
    assert format_lines(1, 10, {"loss": 1.0, "mfu": None}) == ["step  1/10  loss 1.0000"]


def test_evaluations_get_their_own_lines():
    row = {"loss": 1.0, "eval/tang/loss": 3.0, "eval/tang/perplexity": 20.0855, "eval/tang/bits_per_byte": 2.61}
    assert format_lines(5, 10, row)[1:] == ["step  5/10  eval tang: loss 3  ppl 20.09  bits/byte 2.61"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (950, "950"), (999.9, "1k"), (12345, "12.3k"), (999_600, "1M"), (4.56e6, "4.56M")]
)
def test_counts(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7800, "2h 10m"), (356400, "4d 03h")]
)
def test_times(seconds, text):
    assert human_time(seconds) == text


def test_without_a_terminal_lines_go_through_the_logger(caplog):
    progress = build_progress(400, 0, 1, Console(file=io.StringIO()))
    assert isinstance(progress, LineProgress)
    with caplog.at_level(logging.INFO):
        progress.advance()
        progress.log(120, ROW)
        progress.close()
    assert "step 120/400  loss 3.2146" in caplog.text
    assert "ETA 2m 20s" in caplog.text  # 280 steps of 0.5 s


@pytest.fixture
def terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging()
    return stream


def test_on_a_terminal_a_bar_moves_and_log_lines_stay_whole(terminal):
    console = Console(file=terminal, force_terminal=True, width=120)
    progress = build_progress(400, 100, 1, console)
    assert isinstance(progress, BarProgress)
    for _ in range(20):
        progress.advance()
    progress.log(120, {**ROW, "eval/tang/bits_per_byte": 2.61})
    logging.getLogger("megalite.test").warning("a checkpoint was saved")
    progress.close()
    logging.getLogger("megalite.test").warning("after the bar")
    shown = terminal.getvalue()
    assert "120/400" in shown
    assert "loss 3.2146  12.3k tok/s  ETA 2m 20s" in shown
    assert "eval tang: bits/byte 2.61" in shown
    # Rich clears the bar's line before it prints; written past it, the text would follow the bar on the same line.
    before = shown.split("a checkpoint was saved")[0]
    assert before.endswith(("\x1b[2K", "\x1b[1A\x1b[2K", "\n"))
    assert "after the bar" in shown
