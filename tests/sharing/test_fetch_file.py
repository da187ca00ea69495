"""A file of any kind is fetched whole, under its own name, and nothing is left of one that is not."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from kvscope.cli.app import run
from kvscope.core.errors import ShareError
from kvscope.sharing import fetch as fetching
from kvscope.sharing.fetch import fetch_file
from kvscope.sharing.remote import NotThere
from tests.sharing.conftest import Serve

LINE = b'{"index": 0, "input": "A magic number is 42. Which?", "outputs": ["42"], "length": 9}\n'


@pytest.fixture
def memory() -> Iterator[str]:
    """A file as RULER publishes it, in the memory of fsspec."""
    files = fsspec.filesystem("memory")
    files.pipe("/data/niah_single_1/validation.jsonl", LINE)
    yield "memory://data/niah_single_1/validation.jsonl"
    files.rm("/data", recursive=True)


def test_a_file_is_kept_by_its_content(memory: str, cache: Path) -> None:
    counted: list[int] = []
    path, fresh = fetch_file(memory, progress_callback=counted.append)
    assert fresh and path.read_bytes() == LINE and sum(counted) == len(LINE)
    assert path.parts[-2:] == ("niah_single_1", "validation.jsonl")
    assert fetch_file(memory) == (path, False)
    fsspec.filesystem("memory").pipe("/data/niah_single_1/validation.jsonl", LINE * 2)
    other, fresh = fetch_file(memory)
    assert fresh and other != path and other.read_bytes() == LINE * 2
    assert path.read_bytes() == LINE
    assert sorted(file for file in cache.rglob("*") if file.is_file()) == sorted([path, other])


def test_nothing_is_left_of_what_is_not_there(
    memory: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotThere, match="there is no memory://data/nothing"):
        fetch_file("memory://data/nothing.jsonl")
    with pytest.raises(ShareError, match="unknown protocol"):
        fetch_file("zz9://data/nothing.jsonl")

    def fails(self: object, size: int) -> bytes:
        raise ShareError("the network is down", "Check it.")

    monkeypatch.setattr(fetching.Hashed, "read", fails)
    with pytest.raises(ShareError, match="the network is down"):
        fetch_file(memory)
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_over_https_without_the_signature(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "qa 1.jsonl").write_bytes(LINE)
    path, _ = fetch_file(f"{serve(tmp_path / 'data').url}/qa%201.jsonl?signature=secret")
    assert path.read_bytes() == LINE
    assert path.name == "qa-1.jsonl"


def test_prompts_are_traced_from_an_address(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["trace", "--model", "demo", memory, "--max-new-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert '"metric": "all"' in out
    assert f"fetched from {memory}" in err.replace("\n", "")
    assert (tmp_path / "traces" / "validation-demo" / "trace.json").is_file()
    assert run(["trace", "--model", "demo", "memory://data/nothing.jsonl"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
