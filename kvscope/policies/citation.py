"""The publication that a policy's rule is from, as data and as an entry of BibTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from kvscope.core.errors import UsageError
from kvscope.core.latex import escape_latex

# Where a field may hold only what LaTeX and BibTeX read as it is.
_FORMS = {
    "key": r"[A-Za-z][A-Za-z0-9:.-]*",
    "arxiv": r"\d{4}\.\d{4,5}(v\d+)?",
    "doi": r"10\.\d{4,9}/[^\s{}%\\#\"]+",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030c": "v ",
    "\u0327": "c ",
}  # the combining characters, and the commands of LaTeX


@dataclass(frozen=True, kw_only=True)
class Citation:
    """A publication.

    Attributes
    ----------
    key : str
        Its key in BibTeX, which stays the same in all versions of kvscope: ``zhang2023h2o``.
    title : str
        As plain text: it keeps its capital letters in every style.
    authors : str
        ``Family, Given and Family, Given``; a name without a comma is that of an organisation.
    year : int
        When it appeared there.
    arxiv : str or None
        Number on arXiv, with ``v1`` where the rule is that of one version.
    doi : str or None
        Without ``https://doi.org/``.
    booktitle, journal : str or None
        Proceedings or journal; a preprint has neither.
    volume, number, pages : str or None
        Where in the journal.

    Raises
    ------
    UsageError
        If a field is empty or cannot be in a BibTeX file.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str | None = None
    doi: str | None = None
    booktitle: str | None = None
    journal: str | None = None
    volume: str | None = None
    number: str | None = None
    pages: str | None = None

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(form, value):
                raise UsageError(f"citation {self.key!r}: {name} is {value!r}", f"Write it as in {form}")
        if not self.title.strip() or not all(name.strip() for name in self.authors.split(" and ")):
            raise UsageError(f"citation {self.key!r} lacks a title or an author", "Give it both.")

    @property
    def kind(self) -> str:
        """Type of the entry: ``inproceedings``, ``article``, or ``misc`` for a preprint."""
        return "inproceedings" if self.booktitle else "article" if self.journal else "misc"

    def fields(self) -> dict[str, str]:
        """Return the fields of the entry by name, in LaTeX."""
        written = {name: _latex(value) for name in _WRITTEN if (value := getattr(self, name)) is not None}
        plain = {"year": str(self.year)}
        if self.doi is not None:
            plain["doi"] = self.doi
        if self.arxiv is not None:
            plain |= {
                "eprint": self.arxiv,
                "archiveprefix": "arXiv",
                "url": f"https://arxiv.org/abs/{self.arxiv}",
            }
        names = self.authors.split(" and ")
        authors = " and ".join(_latex(name) if "," in name else f"{{{_latex(name)}}}" for name in names)
        return {"title": f"{{{_latex(self.title)}}}", "author": authors, **written, **plain}


_WRITTEN = ("booktitle", "journal", "volume", "number", "pages")


def bibtex(citations: Iterable[Citation]) -> str:
    """Return the entries of a ``.bib`` file in the order of their keys; each once.

    Raises
    ------
    UsageError
        If two different publications have the same key.
    """
    entries: dict[str, Citation] = {}
    for each in citations:
        if entries.setdefault(each.key, each) != each:
            raise UsageError(f"two different publications have the key {each.key}", "Give one of them another key.")
    return "\n".join(_entry(entries[key]) for key in sorted(entries))


def _entry(citation: Citation) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in citation.fields().items()]
    return "\n".join([f"@{citation.kind}{{{citation.key},", *lines, "}"]) + "\n"


def _latex(text: str) -> str:
    """Return text in LaTeX, with commands for accents: ``R{\\'e}`` for ``Ré``. A letter without one stays as it is."""
    made = ""
    for letter in unicodedata.normalize("NFC", text):
        apart = unicodedata.normalize("NFD", letter)
        accent = _ACCENTS.get(apart[1:])
        made += escape_latex(letter) if accent is None else f"{{\\{accent}{apart[0]}}}"
    return made
