"""Merging on eviction: by which rule evicted keys and values are added to those that stay. No torch here.

A scheme is written ``d2o(beta=0.5)``: its kind, and the parameters that differ from their defaults. What it computes is
in `kvscope.merging.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from msgspec import Meta

from kvscope.core.cache_scheme import CacheScheme, scheme_parts
from kvscope.core.errors import UsageError

Kind = Literal["cam", "d2o", "kvmerger"]
PLAIN = "none"  # name of a run that does not merge
PARAMETERS: dict[Kind, tuple[str, ...]] = {
    "cam": ("tokens", "chance", "seed"),
    "d2o": ("beta",),
    "kvmerger": ("threshold",),
}
SHARES = ("beta", "threshold")  # parameters from 0 to 1
CHANCES = ("mean", "max")  # values of `chance`; the other parameters are whole numbers
SHAPE = re.compile(r"(?P<kind>[a-z0-9]+)(?:\((?P<given>[^()]*)\))?")
# A scheme with all of its parameters, as a record has it.
SHARE = r"(0|1|0\.\d{1,9})"
CAM = r"cam\(tokens=[1-9]\d{0,8},chance=(mean|max),seed=\d{1,9}\)"
RECORDED = rf"^({CAM}|d2o\(beta={SHARE}\)|kvmerger\(threshold={SHARE}\))$"
MergeText = Annotated[str, Meta(pattern=RECORDED)]
KNOWN = f"{', '.join(PARAMETERS)}, or {PLAIN}"


@dataclass(frozen=True)
class MergeScheme:
    """By which rule evicted keys and values are added to those that stay.

    Attributes
    ----------
    kind : {"cam", "d2o", "kvmerger"}
        ``cam`` (ICML 2024): values, to the next keys that stay, with a random draw. ``d2o`` (arXiv:2406.13035): keys
        and values, to the most similar key that stays, if it is similar enough. ``kvmerger`` (arXiv:2407.08454): keys
        and values, to one key of a run of similar neighbours, with Gaussian weights.
    tokens : int
        Of ``cam``: among how many of the next keys a value is divided.
    chance : {"mean", "max"}
        Of ``cam``: by what the attention on an evicted key is divided: the mean over the keys that its value is added
        to, or the largest in the cache.
    seed : int
        Of ``cam``: seed of its draws.
    beta : float
        Of ``d2o``: share of the newest evictions in the moving average that is its threshold.
    threshold : float
        Of ``kvmerger``: least cosine of the keys of two neighbours in one run.
    """

    kind: Kind
    tokens: int = 16
    chance: str = "mean"
    seed: int = 0
    beta: float = 0.5
    threshold: float = 0.75

    def __str__(self) -> str:
        """Return the scheme as it is written, without the parameters that have their defaults."""
        return self._text(name for name in PARAMETERS[self.kind] if getattr(self, name) != getattr(MergeScheme, name))

    @property
    def text(self) -> str:
        """The scheme with all parameters."""
        return self._text(PARAMETERS[self.kind])

    def _text(self, names: Iterable[str]) -> str:
        shown = ",".join(f"{name}={_written(name, getattr(self, name))}" for name in names)
        return f"{self.kind}({shown})" if shown else self.kind


def parse_merges(
    text: str | Iterable[str], caches: Sequence[CacheScheme | None] = ()
) -> tuple[MergeScheme | None, ...]:
    """Return the schemes of a list such as ``none,cam(tokens=8),d2o``; None is a run that does not merge.

    Raises
    ------
    UsageError
        As `parse_merge`; if one is given twice; if some of `caches` are quantised, since codes cannot be added.
    """
    parts = scheme_parts(text)
    found = tuple(parse_merge(part) for part in parts)
    if len(set(found)) < len(found):
        raise UsageError(f"--merge {','.join(parts)} names a rule twice", "Name each once.")
    merge = next((one for one in found if one is not None), None)
    cache = next((one for one in caches if one is not None), None)
    if merge is not None and cache is not None:
        raise UsageError(
            f"--merge {merge} cannot be combined with a cache in {cache}: the rule does not define how to merge codes",
            "Use --merge and --cache in two commands.",
        )
    return found


def parse_merge(text: str) -> MergeScheme | None:
    """Return a scheme from its text: ``cam``, ``d2o(beta=0.7)``; None is ``none``.

    Raises
    ------
    UsageError
        If it is not written like one, its kind or a parameter is unknown, or a parameter is out of its range.
    """
    written = text.strip().lower()
    if written == PLAIN:
        return None
    match = SHAPE.fullmatch(written)
    kind = None if match is None else next((known for known in PARAMETERS if known == match["kind"]), None)
    if match is None or kind is None:
        raise UsageError(f"merging rule {text.strip()!r} is unknown", f"Use {KNOWN}.")
    given = dict(_parameter(part, kind) for part in (match["given"] or "").split(",") if part.strip())
    return MergeScheme(
        kind,
        int(given.get("tokens", MergeScheme.tokens)),
        str(given.get("chance", MergeScheme.chance)),
        int(given.get("seed", MergeScheme.seed)),
        float(given.get("beta", MergeScheme.beta)),
        float(given.get("threshold", MergeScheme.threshold)),
    )


def _parameter(part: str, kind: Kind) -> tuple[str, str | float]:
    """Return a parameter's name and value from ``tokens=16``, ``chance=max`` or ``beta=0.5``."""
    name, _, value = (side.strip() for side in part.partition("="))
    known = PARAMETERS[kind]
    if name not in known:
        raise UsageError(f"the merging rule {kind} has no parameter {name!r}", f"Known: {', '.join(known)}.")
    if name == "chance" and value in CHANCES:
        return name, value
    pattern = r"0|1|[01]?\.\d{1,9}" if name in SHARES else r"\d{1,9}"
    number = float(value) if name != "chance" and re.fullmatch(pattern, value) else -1.0
    if not (number >= (1 if name == "tokens" else 0) and (name not in SHARES or number <= 1)):
        usual = _written(name, {each.name: each.default for each in fields(MergeScheme)}[name])
        raise UsageError(
            f"{name}={value} of the merging rule {kind} is not in its range", f"Example: {kind}({name}={usual})."
        )
    return name, number


def _written(name: str, value: object) -> str:
    return f"{float(str(value)):.9f}".rstrip("0").rstrip(".") if name in SHARES else str(value)
