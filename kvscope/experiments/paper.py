"""The papers that come with the package: the settings of their experiments, and what they claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from kvscope.core.claim_records import Claim
from kvscope.core.errors import UsageError
from kvscope.core.json_records import FieldError, Plain, about, decode
from kvscope.core.registry import nearest
from kvscope.experiments.spec import read_mapping

FOLDER = "papers"
GATE = "attention-gate"  # policy whose gate is trained for one model


@dataclass(frozen=True, kw_only=True)
class Part:
    """One experiment of a paper."""

    about: Annotated[str, about("what it measures")]
    settings: Annotated[Mapping[str, Plain], about("its keys, as in the file of any experiment, without the model")]
    bundled: Annotated[Mapping[str, Plain], about("keys that differ with the bundled model, null for those omitted")]
    texts: Annotated[str | None, about("what `--prompts` must have; null if its tasks are made here")] = None


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A file of `papers/`."""

    name: Annotated[str, about("name of the file")]
    title: Annotated[str, about("title of the paper")]
    source: Annotated[str, about("where it is published")]
    about: Annotated[str, about("what it claims, in one sentence")]
    model: Annotated[str, about("the model whose values are shown, or one of the paper's")]
    parts: Annotated[Mapping[str, Part], about("its experiments")]
    claims: Annotated[tuple[Claim, ...], about("what it claims")]
    notes: Annotated[tuple[str, ...], about("how the experiments differ from the paper's, with any model")] = ()
    bundled: Annotated[tuple[str, ...], about("how they differ besides with the bundled model")] = ()

    def __post_init__(self) -> None:
        for claim in self.claims:
            if claim.part not in self.parts:
                raise ValueError(f"a claim names the part {claim.part!r}, which is not there")

    @property
    def gated(self) -> bool:
        """Whether one of its policies needs a gate that is trained for the model."""
        return any(claim.better.policy.startswith(GATE) for claim in self.claims)


def paper_names() -> list[str]:
    """Return the names of the papers, in alphabetical order."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def read_paper(name: str) -> Paper:
    """Return a paper by its name.

    Raises
    ------
    UsageError
        If there is none of that name.
    """
    names = paper_names()
    if name not in names:
        raise UsageError(f"there is no paper {name!r} to reproduce", nearest(name, names))
    return paper_of(read_mapping(packaged(f"{name}.yaml")), name)


def paper_of(data: Mapping[str, object], name: str) -> Paper:
    """Return the paper in the content of a file.

    Raises
    ------
    UsageError
        If a field is missing, or has another type.
    """
    try:
        return decode({"name": name, **data}, Paper)
    except FieldError as error:
        raise UsageError(f"the paper {name}: {error}", "Correct its file.") from error


def packaged(name: str) -> Path:
    """Return the path of a file that comes with the papers."""
    return Path(str(_folder() / name))


def _folder() -> Path:
    return Path(str(files("kvscope.experiments") / FOLDER))
