"""Reading ahead: the same results, bounded, failures told, no hang."""

import threading
import time

import pytest

from megalite.data.prefetch import Prefetcher
from megalite.errors import DataError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_results_come_in_order_whatever_the_depth(depth):
    with Prefetcher(lambda position: position * 10, range(3, 23, 4), depth) as ahead:
        assert [ahead.next() for _ in range(5)] == [30, 70, 110, 150, 190]
        for _ in range(2):
            with pytest.raises(StopIteration):
                ahead.next()
    assert not threads()


def wait_until(done) -> None:
    deadline = time.monotonic() + 20
    while not done() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert done()


def test_no_more_is_made_than_may_wait():
    made = []
    with Prefetcher(made.append, range(100), 2) as ahead:
        wait_until(lambda: len(made) == 3)  # two wait, one looks for room
        time.sleep(0.05)
        assert made == [0, 1, 2]
        ahead.next()
        wait_until(lambda: made == [0, 1, 2, 3])


def fail_at_2(position: int) -> int:
    if position == 2:
        raise DataError("tokens_00000.bin has 7 bytes")
    return position


@pytest.mark.parametrize("depth", [0, 3])
def test_a_failure_comes_out_where_its_result_would_have(depth):
    with Prefetcher(fail_at_2, range(9), depth) as ahead:
        assert [ahead.next(), ahead.next()] == [0, 1]
        with pytest.raises(DataError, match="has 7 bytes"):
            ahead.next()
        if depth:
            with pytest.raises(DataError, match="has 7 bytes"):
                ahead.next()
    assert not threads()


def test_closing_does_not_wait_for_what_nobody_wants():
    ahead = Prefetcher(lambda position: position, range(10**9), 2)
    assert ahead.next() == 0
    ahead.close()
    ahead.close()
    assert not threads()


def test_waiting_is_counted():
    release = threading.Event()
    with Prefetcher(lambda position: release.wait(10), range(2), 1) as ahead:
        threading.Timer(0.1, release.set).start()
        ahead.next()
        assert 0.05 < ahead.wait_seconds < 5
    with Prefetcher(lambda position: time.sleep(0.05), range(1), 0) as alone:
        alone.next()
        assert alone.wait_seconds > 0.04
