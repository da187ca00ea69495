"""The classes of a trace's tokens: special ones, punctuation, and others."""

from __future__ import annotations

import numpy as np

from kvscope.core.token_classes import token_classes
from kvscope.trace.derive import Floats
from kvscope.trace.reader import Trace
from kvscope.trace.signals import missing_signal


def token_kinds(trace: Trace, sequence: int) -> Floats:
    """Return the class of each token of a sequence, float32 ``[T]``; see `kvscope.core.token_classes`.

    Raises TraceError if the trace does not say which tokens are special: it was imported, or recorded before format 13.
    """
    special = trace.header.special_tokens
    if special is None:
        raise missing_signal(trace.path, trace.header, "token_kinds")
    tokens = trace.tokens(sequence)
    texts = [str(text) for text in tokens["text"]]
    return np.array(token_classes(tokens["token_id"].tolist(), texts, special), np.float32)
