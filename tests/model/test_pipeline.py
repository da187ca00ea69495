"""The pipeline limits the bytes that wait, keeps their order, and raises the error of a thread in the caller."""

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from kvscope.core.errors import TraceError
from kvscope.model.copies import Copy, HostCopies
from kvscope.model.generate import trace
from kvscope.model.pipeline import BLOCK as ROOM
from kvscope.model.pipeline import IN_FLIGHT, Pipeline, limit_for, threads_for
from kvscope.trace.parquet import LayerFile
from kvscope.trace.reader import open_trace
from tests.model.tiny import saved

BLOCK = 1000  # bytes


def block(number: int = 0, size: int = BLOCK) -> dict[str, torch.Tensor]:
    return {"array": torch.full((size,), number % 128, dtype=torch.int8)}


@pytest.mark.parametrize("threads", [1, 3])
def test_each_layer_in_its_order_and_never_more_than_the_limit(threads: int) -> None:
    written: dict[int, list[int]] = {layer: [] for layer in range(5)}
    with Pipeline(threads, limit=3 * BLOCK) as pipeline:
        for number in range(60):
            layer = number % 5

            def write(array, own=layer) -> None:
                time.sleep(0.001)
                written[own].append(int(array[0]))

            pipeline.put(layer, write, block(number))
    assert written == {layer: list(range(layer, 60, 5)) for layer in range(5)}
    assert BLOCK < pipeline.peak <= 3 * BLOCK


def test_whoever_brings_too_much_waits() -> None:
    go, put = threading.Event(), []

    def bring(pipeline: Pipeline) -> None:
        for number in range(3):
            pipeline.put(0, lambda array: go.wait(10), block())
            put.append(number)

    with Pipeline(limit=2 * BLOCK) as pipeline:
        other = threading.Thread(target=bring, args=(pipeline,))
        other.start()
        time.sleep(0.1)
        assert put == [0, 1]
        go.set()
        other.join(10)
        assert put == [0, 1, 2]


def test_what_is_larger_than_the_limit_waits_alone() -> None:
    sizes = []
    with Pipeline(limit=BLOCK) as pipeline:
        for size in (10, 5 * BLOCK, 10):
            pipeline.put(0, lambda array: sizes.append(len(array)), block(size=size))
    assert sizes == [10, 5 * BLOCK, 10]
    assert pipeline.peak == 5 * BLOCK


def fails(array) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_of_a_thread_reaches_the_next_caller() -> None:
    written = []

    def bring() -> None:
        with Pipeline(limit=BLOCK) as pipeline:
            pipeline.put(0, fails, block())
            for _ in range(3):  # the first may come before the error, and waits for it
                pipeline.put(0, written.append, block())

    with pytest.raises(OSError, match="No space left"):
        bring()
    assert written == []


def test_an_error_at_the_very_end_is_raised_too() -> None:
    with pytest.raises(OSError, match="No space left"), Pipeline() as pipeline:
        pipeline.put(0, fails, block())


def test_an_error_of_the_caller_ends_the_threads_and_is_the_one_that_is_seen() -> None:
    written, go = [], threading.Event()
    before = threading.active_count()

    def stop() -> None:
        with Pipeline() as pipeline:
            pipeline.put(0, lambda array: go.wait(10), block())
            pipeline.put(0, lambda array: written.append(array), block())
            threading.Timer(0.1, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    time.sleep(0.05)
    assert written == [], "what waited is not written any more"
    assert threading.active_count() == before


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def signalled() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def signalled_just_before_the_wait() -> None:
    """As a signal between Python's check and its wait on a lock, an exception of this kind does not end the wait."""
    time.sleep(0.1)  # the main thread waits by now
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.main_thread().ident), ctypes.py_object(KeyboardInterrupt)
    )


@pytest.mark.parametrize("interrupt", [signalled, signalled_just_before_the_wait])
def test_an_interruption_while_the_last_blocks_are_written_waits_for_no_other(interrupt: Callable[[], None]) -> None:
    """Prevents that files are closed under a thread that still writes."""
    written, pipeline = [], Pipeline()

    def slow(array) -> None:
        until(lambda: pipeline._closed)  # the main thread waits on exit
        interrupt()
        until(lambda: pipeline._error is not None)  # what is being written ends after the interruption
        written.append("first")

    def stop() -> None:
        with pipeline:
            pipeline.put(0, slow, block())
            pipeline.put(0, lambda array: written.append("second"), block())

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        stop()
    assert written == ["first"]
    assert threading.active_count() == before


@pytest.mark.parametrize("store", ["maps", "qkv", "topk:4"])
def test_a_disk_that_is_full_ends_the_recording_with_one_error(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("w1 w2 w3")
    folder, threads = str(saved(tmp_path / "model")), set()

    def full(file: LayerFile, columns: object) -> None:
        threads.add(threading.current_thread())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvscope.model.plan.threads_for", lambda device: 3)
    monkeypatch.setattr(LayerFile, "add", full)
    with pytest.raises(TraceError, match=r"the disk of .* is full") as caught:
        trace(folder, [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=3, store=store)
    assert "space" in caught.value.todo
    assert threads and threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "p.txt"], "nothing passes for a trace"


def test_different_files_are_written_at_the_same_time_and_one_file_by_one_thread() -> None:
    both, inside, most = threading.Barrier(2), [0, 0], [0, 0]

    def write(array, own: int) -> None:
        inside[own] += 1
        most[own] = max(most[own], inside[own])
        both.wait(10)  # nobody passes unless the other file is being written too
        inside[own] -= 1

    with Pipeline(3) as pipeline:
        for number in range(10):
            key = ("attention", "keys")[number % 2], 0
            pipeline.put(key, lambda array, own=number % 2: write(array, own), block())
    assert most == [1, 1]


def test_threads_share_one_limit() -> None:
    go = threading.Event()
    with Pipeline(4, limit=2 * BLOCK) as pipeline:
        for key in range(2):
            pipeline.put(key, lambda array: go.wait(10), block())
        waiting = threading.Thread(target=lambda: pipeline.put(2, lambda array: None, block()))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive(), "two threads are free, the room is not"
        go.set()
        waiting.join(10)
        assert not waiting.is_alive()
    assert pipeline.peak == 2 * BLOCK


class Late(HostCopies):
    """Copies that are made when the test says so, as a device makes them when it comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = threading.Event()
        self.waited: list[threading.Thread] = []

    def start(self, tensors: Mapping[str, torch.Tensor]) -> Copy:
        host = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        copies = self

        class Made:
            def synchronize(self) -> None:
                copies.waited.append(threading.current_thread())
                assert copies.made.wait(10)
                for name, tensor in tensors.items():
                    host[name].copy_(tensor)

        return Copy(host, Made())


def test_only_the_writing_thread_waits_for_a_copy() -> None:
    copies, sums = Late(), list[int]()
    with Pipeline(2, copies=copies) as pipeline:
        for number in range(3):
            pipeline.put(number, lambda array: sums.append(int(array.sum())), block(1))
        assert sums == [], "put returned, though no copy is made"
        copies.made.set()
    assert sums == [BLOCK] * 3
    assert threading.current_thread() not in copies.waited


def test_a_copy_that_fails_leaves_no_room_taken() -> None:
    class Failing(HostCopies):
        def start(self, tensors: Mapping[str, torch.Tensor]) -> Copy:
            raise MemoryError

    def bring() -> None:
        with Pipeline(limit=BLOCK, copies=Failing()) as pipeline:
            for _ in range(2):
                with pytest.raises(MemoryError):
                    pipeline.put(0, fails, block())

    bringing = threading.Thread(target=bring)
    bringing.start()
    bringing.join(10)
    assert not bringing.is_alive()


def test_threads_are_the_cores_that_the_model_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    assert threads_for(torch.device("cpu")) == 4
    assert threads_for(torch.device("cuda")) == 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert threads_for(torch.device("cpu")) == threads_for(torch.device("cuda")) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert threads_for(torch.device("cuda")) == 2


def test_every_thread_has_room_for_a_block() -> None:
    assert limit_for(1) == limit_for(4) == IN_FLIGHT
    assert limit_for(15) == 15 * ROOM > IN_FLIGHT


@pytest.mark.parametrize("store", ["maps+vectors", "qkv", "topk:4"])
def test_files_do_not_depend_on_the_number_of_threads(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(17)))
    folder, checksums = str(saved(tmp_path / "model")), []
    for threads in (1, 3, 8):
        monkeypatch.setattr("kvscope.model.plan.threads_for", lambda device, own=threads: own)
        trace(
            folder, [tmp_path / "p.txt"], output=tmp_path / str(threads), max_new_tokens=40, query_block=3, store=store
        )
        checksums.append(open_trace(tmp_path / str(threads), verify=True).record.checksums)
    assert len(checksums[0]) > 2
    assert checksums[0] == checksums[1] == checksums[2]


@pytest.mark.gpu
def test_copies_from_a_device_are_whole_when_they_are_written() -> None:
    sums = []
    with Pipeline(limit=2**24) as pipeline:
        for number in range(20):
            tensor = torch.full((2**20,), float(number), device="cuda")
            pipeline.put(0, lambda array: sums.append(float(array.sum())), {"array": tensor})
            del tensor  # its memory may be given to others before the copy is made
            torch.randn(2**20, device="cuda")
    assert sums == [number * 2.0**20 for number in range(20)]
