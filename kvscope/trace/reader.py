"""Reading a trace: blocks of attention rows, norms, similarities, tokens."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.errors import TraceError
from kvscope.core.output import checksum
from kvscope.trace.columns import layer_file
from kvscope.trace.derive import Derived, Floats, KeptKeys
from kvscope.trace.loss import approximate
from kvscope.trace.schema import MAPS_AND_VECTORS, QKV, TOPK, VECTORS, TraceHeader, Which, read_header
from kvscope.trace.topk import KeptRates, Rebuilt

REMEDIES = {
    "maps": "Record it again with kvscope trace, or import it with attention.",
    "value_l1": "Record it again with kvscope trace, or import it with value_l1 or values.",
    "value_l2": "Record it again with kvscope trace, or import it with value_l2 or values.",
    "key_l2": "Record it again with kvscope trace, or import it with key_l2 or keys.",
    "similarity": "Record it again with kvscope trace, or import it with keys.",
    "queries": "Record it again with kvscope trace, or import it with queries.",
    "hidden": "Record it again with --hidden.",
    TOPK: f"Record it again with --store {TOPK}.",
    **{
        f"vectors:{name}": f"Record it again with --store {MAPS_AND_VECTORS} or {QKV}, or import it with {name}."
        for name in VECTORS
    },
}


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of a trace: its number, ``P``, ``T``, and whether its continuation was given."""

    index: int
    prompt: int
    length: int
    forced: bool = False


class States(NamedTuple):
    """Vectors of one layer as attention got them: queries ``[H, T, D]``, keys and values ``[G, T, D]``, float32."""

    queries: Floats
    keys: Floats
    values: Floats


class Trace:
    """A whole trace on disk. Open one with `open_trace`.

    Every store answers the same calls: what is not stored is recomputed from the vectors that are, in float32. To
    compute rows elsewhere, on a device, read `vectors` in blocks; ``header.attention`` says what to do with them.

    Attributes
    ----------
    path : Path
        Its folder.
    header : TraceHeader
        What was recorded, and how.
    data : dict
        All of ``trace.json``.
    sequences : list of TokenSequence
        Lengths.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data
        self.header = TraceHeader.from_json(data, path)
        self.sequences = [
            TokenSequence(index, entry["prompt"], entry["length"], bool(entry.get("forced")))
            for index, entry in enumerate(data["sequences"])
        ]
        self._kept: KeptKeys = OrderedDict()
        self._kept_rates: KeptRates = OrderedDict()
        self._index: dict[str, list[tuple[int, int, int]]] = {}

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def layers(self) -> list[int]:
        """Recorded layers, by their number in the model."""
        return self.header.layers

    @property
    def heads(self) -> int:
        """``H``, query heads of a layer."""
        return self.header.heads

    @property
    def kv_heads(self) -> int:
        """``G``, key/value heads of a layer."""
        return self.header.kv_heads

    @property
    def head_dim(self) -> int:
        """``D``, size of a head."""
        return self.header.head_dim

    @property
    def stored(self) -> frozenset[str]:
        """Signals that can be read: those on disk, and those that follow from them, of ``topk`` approximately."""
        rebuilt = ["maps"] if TOPK in self.header.stored else []
        return frozenset((*self.header.stored, *self.header.derived, *rebuilt))

    @property
    def loss(self) -> dict[str, float | None]:
        """Share of a row's mass outside what store ``topk`` keeps, as `Outside.loss` says it; empty if nothing is."""
        loss: dict[str, float | None] = self.data.get("loss") or {}
        return loss if loss.get("worst") else {}

    @property
    def approximate(self) -> list[str]:
        """What about it is not the whole, in sentences: rows of store ``topk``, some heads, every n-th row."""
        return approximate(self.header, self.loss)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the checksums of the files: two traces with the same content have the same."""
        return hashlib.sha256(json.dumps(self.data["checksums"], sort_keys=True).encode()).hexdigest()

    def attention(self, sequence: int, layer: int, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows of full-cache attention, float32 ``[H, stop - start, stop]``, zero above the diagonal.

        Parameters
        ----------
        sequence, layer : int
            Number of the sequence; layer of the model.
        start, stop : int
            Positions of the queries; to the end of the sequence by default.

        Raises
        ------
        TraceError
            If only every n-th row was recorded, and others are asked for.
        """
        stop = self.sequences[sequence].length if stop is None else stop
        self._require_rows(start, stop)
        if TOPK in self.header.stored:
            return self._rebuilt.attention(sequence, layer, start, stop)
        if self._is_derived("maps"):
            return self._derived.attention(sequence, layer, start, stop)
        rows = np.zeros((self.heads, stop - start, stop), np.float32)
        table = self._rows(layer_file("attention", layer), sequence, start, stop, ["head", "position", "weights"])
        for part in table.to_batches():
            position = part["position"].to_numpy()
            inside = (position >= start) & (position < stop)
            if not inside.all():
                part = part.filter(pa.array(inside))
            _scatter(rows, part["head"].to_numpy(), part["position"].to_numpy() - start, part["weights"])
        return rows

    def row_sums(self, sequence: int, layer: int) -> Floats:
        """Return the sum of every row before it was rounded to 16 bit, float32 ``[H, T]``; NaN if not recorded."""
        if TOPK not in self.header.stored and self._is_derived("maps"):
            return self._derived.row_sums(sequence, layer)
        return self._of_rows("row_sum", sequence, layer)

    def residuals(self, sequence: int, layer: int) -> Floats:
        """Return what every row of store ``topk`` has outside its stored keys, float32 ``[H, T]``."""
        self._require(TOPK)
        return self._of_rows("residual", sequence, layer)

    def positions(self, sequence: int) -> NDArray[np.int64]:
        """Return the positions whose rows of attention were recorded, all unless every n-th was asked for."""
        stride = self.header.query_stride
        return np.arange(stride - 1, self.sequences[sequence].length, stride)

    def value_norms(self, sequence: int, layer: int, order: Literal["l1", "l2"] = "l1") -> Floats:
        """Return the norm of every value, float32 ``[G, T]``."""
        return self._norms(f"value_{order}", sequence, layer)

    def key_norms(self, sequence: int, layer: int) -> Floats:
        """Return the L2 norm of every key, float32 ``[G, T]``."""
        return self._norms("key_l2", sequence, layer)

    def similarity(self, sequence: int, layer: int) -> Floats:
        """Return the cosine of every two keys as cached, float32 ``[G, T, T]``, symmetric, 1 on the diagonal."""
        if self._is_derived("similarity"):
            return self._derived.similarity(sequence, layer)
        length = self.sequences[sequence].length
        below = np.zeros((self.kv_heads, length, length), np.float32)
        columns = ["kv_head", "position", "similarity"]
        for part in self._read(layer_file("keys", layer), sequence, columns).to_batches():
            _scatter(below, part["kv_head"].to_numpy(), part["position"].to_numpy(), part["similarity"])
        return below + below.transpose(0, 2, 1) + np.eye(length, dtype=np.float32)

    def mean_queries(self, sequence: int, layer: int) -> Floats:
        """Return the query averaged over the query heads, float32 ``[T, D]``."""
        if self._is_derived("queries"):
            return self._derived.mean_queries(sequence, layer)
        table = self._read(layer_file("queries", layer), sequence, ["position", "mean_query"])
        order = np.argsort(table["position"].to_numpy())
        flat = table["mean_query"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat.reshape(len(order), -1)[order], np.float32)

    def states(self, sequence: int, layer: int) -> States:
        """Return queries, keys and values of every token, of stores ``maps+vectors`` and ``qkv``, or imported."""
        return States(*(self.vectors(sequence, layer, name) for name in VECTORS))

    def vectors(self, sequence: int, layer: int, which: Which, start: int = 0, stop: int | None = None) -> Floats:
        """Return one of them, float32 ``[heads, stop - start, D]``: an import may hold some without the others.

        Parameters
        ----------
        sequence, layer : int
            Number of the sequence; layer of the model.
        which : {"queries", "keys", "values"}
            As attention got them, after rotary embedding, exactly.
        start, stop : int
            Positions; to the end of the sequence by default.
        """
        self._require(f"vectors:{which}")
        stop = self.sequences[sequence].length if stop is None else stop
        name = layer_file("states", layer)
        table = self._rows(name, sequence, start, stop, ["position", which])
        inside = table.slice(start - table["position"][0].as_py() if table.num_rows else 0, stop - start)
        if inside.num_rows < stop - start:
            raise _damaged(self.path, Path(name), f"it lacks positions of sequence {sequence} before {stop}")
        flat = inside[which].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        heads = self.heads if which == "queries" else self.kv_heads
        return np.ascontiguousarray(flat.reshape(stop - start, heads, -1).transpose(1, 0, 2))

    def hidden(self, sequence: int, layer: int) -> Floats:
        """Return the inputs of a layer's attention, float32 ``[T, hidden]``."""
        self._require("hidden")
        table = self._read(layer_file("hidden", layer), sequence, ["hidden"])
        flat = table["hidden"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.array(flat.reshape(self.sequences[sequence].length, -1), np.float32)

    def tokens(self, sequence: int | None = None) -> pd.DataFrame:
        """Return the tokens of one sequence or of all: the columns of ``tokens.parquet``."""
        frame: pd.DataFrame = self._table(self.path / "tokens.parquet").to_pandas()
        return frame if sequence is None else frame[frame["sequence"] == sequence].reset_index(drop=True)

    def _norms(self, column: str, sequence: int, layer: int) -> Floats:
        if self._is_derived(column):
            return self._derived.norms(column, sequence, layer)
        table = self._read(layer_file("keys", layer), sequence, ["kv_head", "position", column])
        return self._grid(table, "kv_head", column, self.kv_heads, sequence)

    def _of_rows(self, column: str, sequence: int, layer: int) -> Floats:
        name = layer_file("topk" if TOPK in self.header.stored else "attention", layer)
        return self._grid(
            self._read(name, sequence, ["head", "position", column]), "head", column, self.heads, sequence
        )

    def _require_rows(self, start: int, stop: int) -> None:
        stride, first = self.header.query_stride, range(start, min(stop, start + 2))  # of any two, one is missing
        missing = [position for position in first if position % stride != stride - 1]
        if missing:
            raise TraceError(
                f"trace {self.path} holds every {stride}th row of attention, and not that of position {missing[0]}",
                "Read rows of Trace.positions one by one, or record it again without --query-stride.",
            )

    def _grid(self, table: pa.Table, head: str, column: str, heads: int, sequence: int) -> Floats:
        grid = np.full((heads, self.sequences[sequence].length), np.nan, np.float32)
        grid[table[head].to_numpy(), table["position"].to_numpy()] = table[column].to_numpy()
        return grid

    @property
    def _rebuilt(self) -> Rebuilt:
        lengths = [(item.prompt, item.length) for item in self.sequences]
        return Rebuilt(self.header, lengths, self._rows, self._kept_rates)

    @property
    def _derived(self) -> Derived:
        return Derived(self.header, [item.length for item in self.sequences], self.vectors, self._kept)

    def _is_derived(self, signal: str) -> bool:
        """Return whether a signal is to be recomputed; raise TraceError if it is neither stored nor follows."""
        self._require(signal)
        return signal not in self.header.stored

    def _require(self, signal: str) -> None:
        if signal not in self.stored:
            raise TraceError(
                f"trace {self.path} does not hold {signal}", REMEDIES.get(signal, "Import it with that array.")
            )

    def _read(self, name: str, sequence: int, columns: list[str]) -> pa.Table:
        return self._table(self.path / name, columns=columns, filters=[("sequence", "=", sequence)])

    def _table(self, file: Path, **options: Any) -> pa.Table:
        try:
            return pq.read_table(file, partitioning=None, **options)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.path, file.relative_to(self.path), "it cannot be read") from error

    def _rows(self, name: str, sequence: int, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Return the row groups of a layer's file that hold any of the positions."""
        try:
            with pq.ParquetFile(self.path / name) as file:
                if name not in self._index:
                    self._index[name] = _ranges(file.metadata)
                wanted = [
                    number
                    for number, (of, first, last) in enumerate(self._index[name])
                    if of == sequence and first < stop and last >= start
                ]
                return file.read_row_groups(wanted, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.path, Path(name), "it cannot be read") from error


def open_trace(path: Path | str, *, verify: bool = False) -> Trace:
    """Return a whole trace.

    Parameters
    ----------
    path : Path or str
        Its folder.
    verify : bool
        Whether to compare the checksum of every file too; sizes are compared always.

    Raises
    ------
    TraceError
        Nothing there, not a trace, older, newer, incomplete, or damaged: each says which.
    """
    path = Path(path)
    data = read_header(path)
    for name, size in data["sizes"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, Path(name), "it is missing")
        if file.stat().st_size != size:
            raise _damaged(path, Path(name), f"it has {file.stat().st_size} bytes instead of {size}")
        if verify and checksum(file) != data["checksums"][name]:
            raise _damaged(path, Path(name), "its checksum is another")
    return Trace(path, data)


def newest_trace(folder: Path = Path("traces")) -> Path:
    """Return the newest whole trace under `folder`.

    Raises
    ------
    TraceError
        If there is none.
    """
    found: list[tuple[str, float, Path]] = []
    for candidate in folder.iterdir() if folder.is_dir() else []:
        try:
            data = read_header(candidate)
        except TraceError:
            continue  # unfinished, foreign or of another version: not what "newest whole trace" means
        found.append((data["created"], candidate.stat().st_mtime, candidate))
    if not found:
        raise TraceError(f"no whole trace under {folder}/", "Record one: kvscope trace --model demo prompt.txt")
    return max(found)[2]


def _ranges(metadata: pq.FileMetaData) -> list[tuple[int, int, int]]:
    """Return sequence, first and last position of every row group."""
    names = [metadata.schema.column(index).name for index in range(metadata.num_columns)]
    ranges = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sequence = group.column(names.index("sequence")).statistics
        position = group.column(names.index("position")).statistics
        ranges.append((sequence.min, position.min, position.max))
    return ranges


def _scatter(target: Floats, head: NDArray[Any], query: NDArray[Any], lists: pa.ListArray) -> None:
    """Put list rows into ``target[head, query, :len]``; copying slices is faster than an index of all numbers."""
    edges = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    values, flat = lists.flatten().to_numpy(zero_copy_only=False), target.reshape(-1)
    starts = (head.astype(np.int64) * target.shape[1] + query) * target.shape[2]
    for start, first, last in zip(starts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        flat[start : start + last - first] = values[first:last]


def _damaged(path: Path, file: Path, why: str) -> TraceError:
    return TraceError(f"trace {path} is damaged: {file}: {why}", "Record it again, or restore the file from a copy.")
