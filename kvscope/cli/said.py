"""What a model said after each prompt, and whether it was right."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.trace.reader import Trace

SHOWN = 3  # sequences
MOST = 160  # characters of the end of a prompt, and of what was said


class Said(TypedDict):
    """The end of a prompt and the text after it; `score` is None without right answers or for a forced continuation."""

    sequence: int
    prompt_end: str
    text: str
    forced: bool
    answers: list[str] | None
    metric: str | None
    score: float | None


def what_was_said(trace: Trace) -> list[Said]:
    """Return the text after the prompt of every sequence, scored where right answers are known."""
    from kvscope.core.answer_records import USUAL
    from kvscope.core.errors import UsageError
    from kvscope.tasks.scoring import SCORES, score

    found: list[Said] = []
    for number, sequence in enumerate(trace.record.sequences):
        texts = [str(text) for text in trace.tokens(number)["text"]]
        text = "".join(texts[sequence.prompt :])
        metric = (sequence.example.metric if sequence.example else None) or USUAL
        known = bool(sequence.answers) and not sequence.forced and metric in SCORES
        try:
            classes = sequence.example.classes if sequence.example else ()
            points = score(metric, text, sequence.answers or (), classes) if known else None
        except UsageError:  # its package is not installed, or it has no classes
            points = None
        found.append(
            {
                "sequence": number,
                "prompt_end": "".join(texts[: sequence.prompt])[-MOST:],
                "text": text,
                "forced": sequence.forced,
                "answers": sequence.answers,
                "metric": metric if sequence.answers else None,
                "score": points,
            }
        )
    return found


def show_said(said: Sequence[Said]) -> None:
    """Print the end of the first prompts and what followed, and how many answers are right."""
    from kvscope.cli import console

    for one in said[:SHOWN]:
        what = "forced" if one["forced"] else "said"
        pairs = [("prompt ends", _line(_end(one["prompt_end"]))), (what, _line(_start(one["text"])))]
        if one["answers"]:
            pairs.append(("answer", f"{' | '.join(one['answers'])}{_verdict(one)}"))
        console.show_pairs(pairs, title=f"sequence {one['sequence']}")
    scores = [one["score"] for one in said if one["score"] is not None]
    if len(said) > SHOWN:
        console.show_text(f"The first {SHOWN} of {len(said)} sequences; kvscope trace --json prints all.")
    if len(scores) > 1:
        console.show_text(f"Mean score of {len(scores)} answers: {sum(scores) / len(scores):.2f}")


def _verdict(one: Said) -> str:
    if one["score"] is None:
        return ""
    right = {1.0: "right", 0.0: "wrong"}.get(one["score"], f"{one['score']:.2f}")
    return f": {right} ({one['metric']})"


def _end(text: str) -> str:
    """Return the end of a prompt; where it was cut off, it begins with dots and at a word."""
    if len(text) < MOST:
        return text
    _, _, rest = text.partition(" ")
    return f"... {rest or text}"


def _start(text: str) -> str:
    """Return the start of a text; where it is cut off, it ends with dots."""
    return text if len(text) <= MOST else f"{text[:MOST]} ..."


def _line(text: str) -> str:
    """Return a text on one line: line ends are shown."""
    return text.replace("\n", "\\n")
