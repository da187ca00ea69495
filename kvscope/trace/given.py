"""What the sequences of a trace were given, and which of them are nearly the same."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core.near_copies import clusters
from kvscope.trace.reader import Trace

UNKNOWN = -1  # id of a token that an import does not name


def near_copies(*traces: Trace) -> tuple[int, ...]:
    """Return the cluster of near-copies of every sequence, as `clusters`; empty where no two are, or none is known.

    Sequences are compared by what they were given: by the prompt where the model generated the rest, otherwise by all
    of their tokens.

    Raises
    ------
    TraceError
        If the tokens of a trace cannot be read.
    """
    return clusters([given for trace in traces for given in given_tokens(trace)])


def given_tokens(trace: Trace) -> list[Sequence[int]]:
    """Return the ids of the tokens that each sequence was given.

    The tokens of an image are replaced by a number that only images of the same bytes share. A sequence with a token
    that is not known is like no other: its tokens are numbers that no other has.
    """
    frame = trace.tokens()
    found: list[Sequence[int]] = []
    fresh = -1  # no id is below 0
    for sequence, record in zip(trace.sequences, trace.record.sequences, strict=True):
        generated = trace.header.protocol == "generated" and not sequence.forced
        ids: list[int] = frame.loc[frame["sequence"] == sequence.index, "token_id"].tolist()
        ids = ids[: sequence.prompt if generated else sequence.length]
        if UNKNOWN in ids:
            found.append([fresh - place for place in range(len(ids))])
            fresh -= len(ids)
            continue
        for image in record.images:
            ids[image.start : image.stop] = [-(2**64) - int(image.sha256, 16)] * (image.stop - image.start)
        found.append(ids)
    return found
