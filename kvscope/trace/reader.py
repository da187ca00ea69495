"""Read a trace: blocks of attention rows, norms, similarities, vectors, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvscope.core.errors import TraceError
from kvscope.trace.cache import Cache
from kvscope.trace.derive import Derived, Floats, KeptKeys
from kvscope.trace.files import TraceFiles
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.record import StorageError, TraceRecord
from kvscope.trace.record_file import read_record
from kvscope.trace.schema import TOPK, VECTORS, Which
from kvscope.trace.shown import html, line
from kvscope.trace.signals import missing_signal
from kvscope.trace.storage_error import approximate
from kvscope.trace.stored import StoredRows, StoredSignals
from kvscope.trace.topk import KeptRates, Rebuilt


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of a trace: its number, ``P``, ``T``, and whether its continuation was forced."""

    index: int
    prompt: int
    length: int
    forced: bool = False


class States(NamedTuple):
    """Inputs of the attention of one layer, float32: queries ``[H, T, D]``, keys and values ``[G, T, D]``."""

    queries: Floats
    keys: Floats
    values: Floats


class Trace:
    """A complete trace on disk: `trace` records one, `open_trace` (``kvscope.open``) opens one.

    All methods work for every store: what is not stored is recomputed from stored vectors. To compute rows on a device
    instead, read `vectors` in blocks; ``header.attention`` defines how weights are computed from them.

    Attributes
    ----------
    path : Path
        Folder of the trace.
    header : TraceHeader
        What was recorded, and how.
    record : TraceRecord
        The content of ``trace.json``.
    sequences : list of TokenSequence
        Number and lengths of each sequence.
    """

    def __init__(self, path: Path, record: TraceRecord, *, compare: bool = True) -> None:
        self.path, self.record = path, record
        self.header = record.header
        self.sequences = [
            TokenSequence(index, item.prompt, item.length, item.forced) for index, item in enumerate(record.sequences)
        ]
        self._sizes = [(item.prompt, item.length) for item in record.sequences]
        self._files = TraceFiles(path, record, compare=compare)
        self._stored = StoredSignals(record.header, record.sequences, self._files)
        self._kept: KeptKeys = Cache()
        self._kept_rates: KeptRates = Cache()

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def __repr__(self) -> str:
        return f"<{line(self.path, self.header, self._sizes)}>"

    def _repr_html_(self) -> str:
        return html(self.path, self.header, self._sizes)

    @property
    def layers(self) -> list[int]:
        """Recorded layers, by their number in the model."""
        return self.header.layers

    @property
    def heads(self) -> int:
        """``H``, the number of query heads of a layer; the largest if layers differ (see `heads_of`)."""
        return self.header.heads

    @property
    def kv_heads(self) -> int:
        """``G``, the number of key/value heads of a layer; the largest if layers differ."""
        return self.header.kv_heads

    @property
    def head_dim(self) -> int:
        """``D``, the size of a head; the largest if layers differ."""
        return self.header.head_dim

    def heads_of(self, layer: int) -> LayerHeads:
        """Return the heads of a recorded layer and their sizes."""
        return self.header.heads_of(layer)

    @property
    def stored(self) -> frozenset[str]:
        """Signals that can be read: those on disk, those derived from them, and the rebuilt rows of ``topk``."""
        header, kinds = self.header, self.header.special_tokens is not None
        beside = {"maps": TOPK in header.stored, "rotary": bool(header.rotary), "token_kinds": kinds}
        return frozenset((*header.stored, *header.derived, *(name for name, there in beside.items() if there)))

    @property
    def holds_rows(self) -> bool:
        """Whether whole rows are on disk, so that none is recomputed from vectors or rebuilt."""
        return "maps" in self.header.stored and TOPK not in self.header.stored

    @property
    def storage_error(self) -> StorageError | None:
        """The largest error of rebuilt rows of store ``topk``; None if the rows are exact."""
        error = self.record.storage_error
        return error if error is not None and error.worst else None

    @property
    def approximate(self) -> list[str]:
        """Sentences that state what the trace lacks: exact rows (store ``topk``), heads or rows; empty if nothing."""
        return approximate(self.header, self.storage_error)

    @property
    def identity(self) -> str:
        """SHA-256 over the checksums of the files, which is equal for traces with the same content."""
        return self.record.identity

    def attention(self, sequence: int, layer: int, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows of full-cache attention, float32 ``[H, stop - start, stop]``, zero above the diagonal.

        Parameters
        ----------
        sequence, layer : int
            Number of the sequence; layer of the model.
        start, stop : int
            Range of query positions; `stop` is by default the end of the sequence.

        Raises
        ------
        TraceError
            If only every n-th row was recorded, and the range includes others.
        """
        stop = self.sequences[sequence].length if stop is None else stop
        self._require_rows(start, stop)
        if TOPK in self.header.stored:
            return self._rebuilt.attention(sequence, layer, start, stop)
        if self._is_derived("maps"):
            return self._derived.attention(sequence, layer, start, stop)
        return self._stored.attention(sequence, layer, start, stop)

    def stored_rows(self, sequence: int, layer: int, start: int, stop: int) -> StoredRows:
        """Return the rows of `attention` in the stored precision; only if whole rows are stored (`holds_rows`)."""
        self._require_rows(start, stop)
        return self._stored.rows(sequence, layer, start, stop)

    def row_sums(self, sequence: int, layer: int) -> Floats:
        """Return the sum of every row before rounding to 16 bit, float32 ``[H, T]``; NaN for rows not recorded."""
        if TOPK not in self.header.stored and self._is_derived("maps"):
            return self._derived.row_sums(sequence, layer)
        return self._stored.of_rows("row_sum", sequence, layer)

    def residuals(self, sequence: int, layer: int) -> Floats:
        """Return for every row of store ``topk`` the mass on keys that are not stored, float32 ``[H, T]``."""
        self._require(TOPK)
        return self._stored.of_rows("residual", sequence, layer)

    def positions(self, sequence: int) -> NDArray[np.int64]:
        """Return the positions whose rows of attention were recorded; all unless a query stride was chosen."""
        return self._stored.positions(0, self.sequences[sequence].length)

    def value_norms(self, sequence: int, layer: int, order: Literal["l1", "l2"] = "l1") -> Floats:
        """Return the norm of every value, float32 ``[G, T]``."""
        return self.key_numbers(f"value_{order}", sequence, layer)

    def key_norms(self, sequence: int, layer: int) -> Floats:
        """Return the L2 norm of every key, float32 ``[G, T]``."""
        return self.key_numbers("key_l2", sequence, layer)

    def similarity(self, sequence: int, layer: int) -> Floats:
        """Return the cosines of all pairs of cached keys, float32 ``[G, T, T]``, symmetric, 1 on the diagonal."""
        if self._is_derived("similarity"):
            return self._derived.similarity(sequence, layer)
        return self._stored.similarity(sequence, layer)

    def mean_queries(self, sequence: int, layer: int) -> Floats:
        """Return the query averaged over the query heads, float32 ``[T, D]``."""
        if self._is_derived("queries"):
            return self._derived.mean_queries(sequence, layer)
        return self._stored.mean_queries(sequence, layer)

    def states(self, sequence: int, layer: int) -> States:
        """Return queries, keys and values of every token; for stores ``maps+vectors`` and ``qkv``, and imports."""
        return States(*(self.vectors(sequence, layer, name) for name in VECTORS))

    def vectors(self, sequence: int, layer: int, which: Which, start: int = 0, stop: int | None = None) -> Floats:
        """Return queries, keys or values, float32 ``[heads, stop - start, D]``; an import may have only some of them.

        Parameters
        ----------
        sequence, layer : int
            Number of the sequence; layer of the model.
        which : {"queries", "keys", "values"}
            Which of them, exactly as passed to attention: after the rotary embedding.
        start, stop : int
            Range of positions; `stop` is by default the end of the sequence.
        """
        self._require(f"vectors:{which}")
        stop = self.sequences[sequence].length if stop is None else stop
        return self._stored.vectors(sequence, layer, which, start, stop)

    def hidden(self, sequence: int, layer: int) -> Floats:
        """Return the inputs of a layer's attention, float32 ``[T, hidden]``."""
        self._require("hidden")
        return self._stored.hidden(sequence, layer)

    def require_whole(self, *, verify: bool = False) -> None:
        """Raise TraceError unless every file exists, and the tokens are those of the sequences.

        Parameters
        ----------
        verify : bool
            Whether to compare the checksum of every file too.
        """
        self._files.checked.require_there()
        if verify:
            self._files.checked.require_same()
        self._stored.tokens()

    def tokens(self, sequence: int | None = None) -> pd.DataFrame:
        """Return the tokens of one sequence or of all: the columns of ``tokens.parquet``."""
        frame = self._stored.tokens()
        return frame if sequence is None else frame[frame["sequence"] == sequence].reset_index(drop=True)

    def key_numbers(self, column: str, sequence: int, layer: int) -> Floats:
        """Return a signal with one number for every key, as ``value_out_l1`` or ``reconstruction``: ``[G, T]``."""
        if self._is_derived(column):
            return self._derived.norms(column, sequence, layer)
        return self._stored.norms(column, sequence, layer)

    def _require_rows(self, start: int, stop: int) -> None:
        stride, checked = self.header.query_stride, range(start, min(stop, start + 2))  # of two rows one is missing
        missing = [position for position in checked if position % stride != stride - 1]
        if missing:
            raise TraceError(
                f"trace {self.path} has every {stride}th row of attention, but not that of position {missing[0]}",
                "Read only rows in Trace.positions, one at a time, or record it again without --query-stride.",
            )

    @property
    def _rebuilt(self) -> Rebuilt:
        lengths = [(item.prompt, item.length) for item in self.sequences]
        return Rebuilt(self.header, lengths, self._files, self._kept_rates)

    @property
    def _derived(self) -> Derived:
        return Derived(self.header, [item.length for item in self.sequences], self.vectors, self._kept)

    def _is_derived(self, signal: str) -> bool:
        """Return whether a signal must be recomputed; raise TraceError if it is neither stored nor derived."""
        self._require(signal)
        return signal not in self.header.stored

    def _require(self, signal: str) -> None:
        if signal not in self.stored:
            raise missing_signal(self.path, self.header, signal)


def open_trace(path: Path | str, *, verify: bool = False, compare: bool = True) -> Trace:
    """Return the trace in a folder.

    Parameters
    ----------
    path : Path or str
        Folder of the trace.
    verify : bool
        Whether to check the checksums of all files now. Otherwise each file is checked when it is first read. Sizes
        are always checked.
    compare : bool
        If False, no checksum is checked at all: for a disk that is too slow to read twice.

    Raises
    ------
    TraceError
        If there is no trace, or it is incomplete, damaged, or of a version that cannot be read.
    """
    path = Path(path)
    trace = Trace(path, read_record(path), compare=compare or verify)
    trace.require_whole(verify=verify)
    return trace
