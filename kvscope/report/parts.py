"""Sequences in the panels of single tokens, and the order of layers where not all fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvscope.core.json import JsonDict
from kvscope.core.token_parts import shown_parts
from kvscope.report.encoding import visible, visible_token
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace


@dataclass(frozen=True)
class NamedSpan:
    """Tokens `start` to `stop` - 1 of a sequence, such as a fact, under a name."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One sequence of one trace, with its token texts.

    Attributes
    ----------
    name : str
        Unique in the page: number of the trace, a dot, number of the sequence.
    identity : str
        Of the trace.
    number, prompt, length : int
        Number of the sequence, ``P`` and ``T``.
    tokens : list of str or None
        Texts; None if the trace was not found. Those of an image are ``image 1 (1/16)``, ``image 1 (2/16)``, ...
    images : list of JsonDict
        Number, file, size and tokens of each image of the prompt.
    """

    name: str
    identity: str
    number: int
    prompt: int
    length: int
    tokens: list[str] | None
    images: list[JsonDict] = field(default_factory=list)


def sequences_of(replays: Sequence[Replay], traces: Mapping[str, Trace]) -> Iterator[Part]:
    """Yield every sequence once, first sequences of all traces first."""
    distinct = list({replay.info.trace.identity: replay.info.trace for replay in replays}.values())
    for number in range(max(len(trace.sequences) for trace in distinct)):
        for index, trace in enumerate(distinct):
            if number < len(trace.sequences):
                info, opened = trace.sequences[number], traces.get(trace.identity)
                tokens = None if opened is None else _texts(opened, number)
                name = f"{index}.{number}"
                images = [] if opened is None else _images(opened, number)
                yield Part(name, trace.identity, number, info.prompt, info.length, tokens, images)


def spread(layers: Sequence[int]) -> list[int]:
    """Return layers in an order of which every prefix is spread over the depth: middle, first, last, quarters."""
    last = len(layers) - 1
    order, queue = [last // 2, 0, last], [(0, last)]
    while queue:
        low, high = queue.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            queue += [(low, middle), (middle, high)]
    return [int(layers[place]) for place in dict.fromkeys(order)]


def _texts(trace: Trace, sequence: int) -> list[str]:
    frame = trace.tokens(sequence).sort_values("position")
    texts = ["" if text is None else str(text) for text in frame["text"]]
    shown = [visible_token(text) for text in shown_parts(texts)]
    for number, image in enumerate(trace.record.sequences[sequence].images, 1):
        count = image.stop - image.start
        shown[image.start : image.stop] = [f"image {number} ({place}/{count})" for place in range(1, count + 1)]
    return shown


def _images(trace: Trace, sequence: int) -> list[JsonDict]:
    """Return what the page shows of the images of a sequence: of a path only the name of the file."""
    return [
        {
            "number": number,
            "file": visible(image.file.rstrip("/").replace("\\", "/").rpartition("/")[2]),
            "width": image.width,
            "height": image.height,
            "start": image.start,
            "stop": image.stop,
        }
        for number, image in enumerate(trace.record.sequences[sequence].images, 1)
    ]
