"""What ``trace.json`` says of a prompt: what its dataset says about it, its named parts, and its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kvscope.core.json import JsonDict
from kvscope.core.json_records import Checksum, NotNegative, Number, Positive, about, plain


@dataclass(frozen=True)
class ExampleRecord:
    """What a dataset says about an example."""

    id: Annotated[str | None, about("its name", omit=True)] = None
    task: Annotated[str | None, about("its task", omit=True)] = None
    metric: Annotated[str | None, about("how an answer is scored: `exact`, `all`, `any`, `f1`, ...", omit=True)] = None
    length: Annotated[Number | None, about("length for which it was made", omit=True)] = None
    depth: Annotated[NotNegative | None, about("depth of its fact in the prompt, 0 to 1", omit=True)] = None
    classes: Annotated[
        tuple[str, ...], about("classes from which an answer must choose, for the score `classification`", omit=True)
    ] = ()


@dataclass(frozen=True)
class SpanRecord:
    """A named part of a prompt, such as a fact or the question."""

    name: Annotated[str, about("its name; several spans may have the same")]
    start: Annotated[Number, about("its first token")]
    stop: Annotated[Positive, about("the token after its last")]


@dataclass(frozen=True)
class ImageRecord:
    """An image of a prompt; its span in `spans` is called ``image 1``, ``image 2``, ..."""

    file: Annotated[str, about("path or address that it was read from")]
    sha256: Annotated[Checksum, about("SHA-256 of the bytes of the file")]
    width: Annotated[Positive, about("pixels in a line")]
    height: Annotated[Positive, about("lines of pixels")]
    start: Annotated[Number, about("first token that stands for a part of it")]
    stop: Annotated[Positive, about("the token after the last; tokens that end its lines are in between")]
    tokens: Annotated[Positive, about("how many tokens stand for its parts")]

    @property
    def facts(self) -> JsonDict:
        """All but its place, which decides nothing."""
        facts = plain(self)
        del facts["file"]
        return facts
