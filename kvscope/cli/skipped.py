"""One line about everything that a command skips: names, reasons and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

AGAIN = re.compile(r"Record it again with (--[a-z]+(?: [a-z+]+)?)")  # as `kvscope.trace.signals` writes it


def skipped_line(skipped: Mapping[str, str], remedies: Mapping[str, str], otherwise: str | None = None) -> str:
    """Return one line that names what is skipped, by reason, and ends with what to do.

    Parameters
    ----------
    skipped : mapping of str to str
        Reason by label, as the message of an error: ``keydiff needs keys, which traces/a does not hold``.
    remedies : mapping of str to str
        What to do, by label; may lack labels.
    otherwise : str, optional
        What to do where there is more than one remedy; by default, to name one, which prints its own.
    """
    labels: dict[str, list[str]] = {}
    for label, why in skipped.items():
        labels.setdefault(_reason(label, why), []).append(label.partition("(")[0])
    parts = [f"{', '.join(dict.fromkeys(of))} ({why})" for why, of in labels.items()]
    todos = dict.fromkeys(remedies.get(label, "") for label in skipped)
    flags = dict.fromkeys(flag for todo in todos for flag in AGAIN.findall(todo))
    first = next(iter(labels.values()))[0]
    if flags:
        todo = f"Record the trace again with {' '.join(flags)} to include more of them."
    elif len(todos) == 1 and "" not in todos:
        (todo,) = todos
    else:
        todo = otherwise or f"Name one to see what it needs: --policy {first}"
    return f"skipped: {'; '.join(parts)}. {todo}"


def not_computed(left_out: Mapping[str, str]) -> list[str]:
    """Return one line for each reason why metrics were not computed, which ends with what to do."""
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return [f"Not computed: {', '.join(of)}. {why[:1].upper()}{why[1:]}" for why, of in names.items()]


def _reason(label: str, why: str) -> str:
    """Return a reason without the label and the path of the trace."""
    return re.sub(r", which .* does not hold$", "", why.removeprefix(label).strip(" :"))
