"""The pipeline limits the bytes that wait, keeps their order, and raises the error of a thread in the caller."""

import threading
import time

import pytest
import torch

from kvscope.model.pipeline import THREADS, Pipeline, threads_for

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


def test_threads_by_device() -> None:
    assert threads_for(torch.device("cpu")) == 1
    assert 1 <= threads_for(torch.device("cuda")) <= THREADS


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
