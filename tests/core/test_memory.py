"""Memory that does not suffice for libraries is named as that, before they end the process."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from pyarrow import ArrowException, parquet

import kvscope
from kvscope.core.memory import is_library_too_large, require_addresses

THREAD = "Unknown error: Failed to launch worker thread: Resource temporarily unavailable"

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux names the addresses in use")


def limit(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (number, resource.RLIM_INFINITY))


def test_too_few_addresses_are_an_error_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit(monkeypatch, used + 100 * 2**20)
    with pytest.raises(ImportError, match="cannot allocate memory for numba") as caught:
        require_addresses(2**30, "numba")
    assert is_library_too_large(caught.value)


def test_enough_addresses_or_no_limit_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (2**50, resource.RLIM_INFINITY):
        limit(monkeypatch, number)
        require_addresses(2**30, "numba")


def test_a_thread_that_pyarrow_cannot_start_is_one_too() -> None:
    wrapped = ValueError("it cannot be read")
    wrapped.__cause__ = ArrowException(THREAD)
    assert is_library_too_large(ArrowException(THREAD)) and is_library_too_large(wrapped)
    assert not is_library_too_large(ArrowException("Parquet magic bytes not found"))


def test_a_file_is_not_called_damaged_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ArrowException(THREAD)

    root = Path(__file__).parents[2]
    trace, replay = kvscope.open(root / "traces" / "example"), kvscope.open_replay(root / "reports" / "example")
    monkeypatch.setattr(parquet.ParquetFile, "read", refuse)
    monkeypatch.setattr(parquet, "read_table", refuse)
    for read in (lambda: trace.tokens(0), replay.fidelity):
        with pytest.raises(ArrowException, match="worker thread"):
            read()
