"""What sequences were given is compared, and nothing that is not known."""

from pathlib import Path

from kvscope.trace.given import given_tokens, near_copies
from kvscope.trace.prompt_parts import ImageRecord
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import SequenceRecord
from tests.trace.make import record

PROMPT, LENGTH = 6, 10


def trace(path: Path, ids: list[list[int]], forced: bool = False, images: tuple[str, ...] = ()) -> Trace:
    """Return a trace of these tokens; `images` are checksums, an image for each sequence at tokens 1 to 5."""
    records = [
        SequenceRecord(
            PROMPT, LENGTH, forced, images=[ImageRecord("a.png", images[n], 4, 4, 1, 5, 4)] if images else []
        )
        for n in range(len(ids))
    ]
    record(path, lengths=[LENGTH] * len(ids), prompt=PROMPT, ids=ids, sequences=records)
    return open_trace(path)


def test_generated_sequences_are_compared_by_their_prompts(tmp_path: Path) -> None:
    ids = [[*range(6), 90, 91, 92, 93], [*range(6), 80, 81, 82, 83], [*range(20, 26), 90, 91, 92, 93]]
    assert near_copies(trace(tmp_path / "generated", ids)) == (0, 0, 1)
    assert near_copies(trace(tmp_path / "forced", ids, forced=True)) == ()


def test_images_of_other_bytes_are_other_tokens(tmp_path: Path) -> None:
    ids = [list(range(10))] * 3
    read = trace(tmp_path / "images", ids, images=("a" * 64, "b" * 64, "a" * 64))
    assert near_copies(read) == (0, 1, 0)
    assert [given[0] for given in given_tokens(read)] == [0, 0, 0]


def test_unknown_tokens_make_no_near_copies(tmp_path: Path) -> None:
    assert near_copies(trace(tmp_path / "unknown", [[-1] * 10] * 6)) == ()


def test_several_traces_are_one_list(tmp_path: Path) -> None:
    one = trace(tmp_path / "one", [list(range(10)), list(range(50, 60))])
    other = trace(tmp_path / "other", [list(range(50, 60))])
    assert near_copies(one, other) == (0, 1, 1)
    assert near_copies(one) == near_copies(other) == ()
