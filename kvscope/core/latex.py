"""Text in LaTeX: the characters that have a meaning there."""

from __future__ import annotations

# Braces have commands of their own: BibTeX counts those after a backslash too, and an odd one ends the field elsewhere.
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "{": r"\textbraceleft{}",
    "}": r"\textbraceright{}",
} | {each: f"\\{each}" for each in "&%$#_"}


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is.

    >>> print(escape_latex("50% of {a_b}"))
    50\\% of \\textbraceleft{}a\\_b\\textbraceright{}
    """
    return "".join(_SPECIAL.get(each, each) for each in text)
