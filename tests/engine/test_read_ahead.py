"""Results come in order whatever the threads do; errors reach the caller; no thread remains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kvscope.engine.read_ahead import ReadAhead, Reading


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvscope-read")]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_in_order(threads: int) -> None:
    def read(number: int) -> int:
        time.sleep(0.004 * (number % 3))
        return number

    readings = (Reading(10, lambda number=number: read(number)) for number in range(20))
    with ReadAhead(readings, threads, limit=35) as read_ahead:
        assert list(read_ahead) == list(range(20))
    assert reading_threads() == []


def test_it_reads_ahead_up_to_the_limit() -> None:
    requested: list[int] = []

    def readings() -> Iterator[Reading[int]]:
        for number in range(10):
            requested.append(number)
            yield Reading(10, lambda number=number: number)

    with ReadAhead(readings(), 1, limit=30) as read_ahead:
        assert next(read_ahead) == 0
        assert requested == [0, 1, 2, 3, 4]  # three wait, and one more has been looked at
        assert next(read_ahead) == 1
        assert requested == [0, 1, 2, 3, 4, 5]


def test_what_is_larger_than_the_limit_is_read_alone() -> None:
    with ReadAhead((Reading(100, lambda n=n: n) for n in range(4)), 2, limit=30) as read_ahead:
        assert list(read_ahead) == [0, 1, 2, 3]


def test_the_next_is_read_during_work_on_this_one() -> None:
    began = threading.Event()

    def second() -> int:
        began.set()
        return 2

    with ReadAhead(iter([Reading(1, lambda: 1), Reading(1, second)]), 1) as read_ahead:
        assert next(read_ahead) == 1
        assert began.wait(5), "the second reading begins before it is asked for"


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_in_its_turn(threads: int) -> None:
    def fail() -> int:
        raise ValueError("broken")

    readings = [Reading(1, lambda: 0), Reading(1, lambda: 1), Reading(1, fail), Reading(1, lambda: 3)]
    got: list[int] = []
    with pytest.raises(ValueError, match="broken"), ReadAhead(iter(readings), threads) as read_ahead:
        got.extend(read_ahead)
    assert got == [0, 1]
    assert reading_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_early_drops_what_has_not_begun(error: type[BaseException]) -> None:
    done: list[int] = []

    def read(number: int) -> int:
        time.sleep(0.02)
        done.append(number)
        return number

    readings = (Reading(1, lambda number=number: read(number)) for number in range(1000))

    def interrupted() -> None:
        with ReadAhead(readings, 2, limit=500) as read_ahead:
            next(read_ahead)
            raise error

    with pytest.raises(error):
        interrupted()
    assert reading_threads() == []
    assert len(done) < 20
