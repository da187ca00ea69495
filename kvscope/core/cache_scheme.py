"""Quantised caches: in how many bits keys and values are cached, and from when on. No torch here.

A scheme is written ``int4:kivi(group=32,residual=128)``: the size of a code, the kind, and the parameters that differ
from their defaults. `CacheScheme` says for every token when its key and its value become codes; how codes are made is
in `kvscope.quantisation.codes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from kvscope.core.errors import UsageError

Kind = Literal["kivi", "kvquant", "quanto", "fp8"]
BITS: dict[Kind, tuple[int, ...]] = {"kivi": (2, 3, 4, 8), "kvquant": (2, 3, 4, 8), "quanto": (2, 4), "fp8": (8,)}
HALF = 16  # bits of a number in full precision, and of a scale, a zero point and an outlier
PLAIN = ("16bit", "none")  # names of a cache that is not quantised
PARAMETERS: dict[Kind, tuple[str, ...]] = {
    "kivi": ("group", "residual"),
    "kvquant": ("group", "outliers", "first"),
    "quanto": ("group", "residual"),
    "fp8": (),
}
SHAPE = re.compile(r"(?:int(?P<bits>\d+)(?::(?P<kind>[a-z0-9]+))?|(?P<fp8>fp8))(?:\((?P<given>[^()]*)\))?")
# A scheme with all of its parameters, as a record has it.
RECORDED = (
    r"^(fp8|int[2348]:kivi\(group=[1-9]\d{0,8},residual=[1-9]\d{0,8}\)"
    r"|int[24]:quanto\(group=[1-9]\d{0,8},residual=[1-9]\d{0,8}\)"
    r"|int[2348]:kvquant\(group=[1-9]\d{0,8},outliers=[0-4]?\d(\.\d+)?%,first=\d{1,9}\))$"
)
CacheText = Annotated[str, Meta(pattern=RECORDED)]
KNOWN = "int4:kivi, int4:kvquant (2, 3, 4 or 8 bit), int4:quanto (2 or 4 bit), fp8, or 16bit"


@dataclass(frozen=True)
class CacheScheme:
    """How the keys and values of a cache are quantised.

    Attributes
    ----------
    kind : {"kivi", "kvquant", "quanto", "fp8"}
        ``kivi`` (arXiv:2402.02750): keys per channel over groups of tokens, as the cache holds them (after rotation),
        values per token over groups of channels; asymmetric, uniform. ``kvquant`` (arXiv:2401.18079, without its
        calibration): keys per channel before rotation, values per token, uniform, with the outliers in 16 bit.
        ``quanto``: as the ``QuantizedCache`` of transformers with the backend quanto: keys, after rotation, and values
        per token over groups of channels, uniform. ``fp8``: e4m3, with a scale for each token's key and value.
    bits : int
        Bits of a code.
    group : int
        Tokens that share the scale of a key's channel; in ``kivi`` also the channels that share the scale of a value.
        In ``quanto`` the channels that share a scale.
    residual : int
        Of ``kivi``: so many of the newest values are in full precision, and keys are quantised whenever so many more
        tokens have come. A multiple of `group`. Of ``quanto``: the prompt becomes codes at its end, and what comes
        later whenever so many more tokens have come.
    outliers : float
        Of ``kvquant``: share of the numbers that stay in full precision.
    first : int
        Of ``kvquant``: so many of the first tokens stay in full precision.
    """

    kind: Kind
    bits: int
    group: int = 32
    residual: int = 128
    outliers: float = 0.01
    first: int = 1

    def __str__(self) -> str:
        """Return the scheme as it is written, without the parameters that have their defaults."""
        return self._text(name for name in PARAMETERS[self.kind] if getattr(self, name) != _default(self.kind, name))

    @property
    def text(self) -> str:
        """The scheme with all parameters."""
        return self._text(PARAMETERS[self.kind])

    @property
    def levels(self) -> int:
        """Largest code."""
        return int(2**self.bits - 1)

    @property
    def before_rotation(self) -> bool:
        """Whether keys are quantised without their rotary position."""
        return self.kind == "kvquant"

    @property
    def per_token(self) -> bool:
        """Whether every token's key has scales of its own, so that nothing depends on which others are held."""
        return self.kind in ("quanto", "fp8")

    def coded_keys(self, tokens: int, prompt: int) -> int:
        """Return how many keys, the oldest, are codes once so many tokens have come and the last has been attended to.

        Those of the first tokens that `whole` names are not codes, and those that are evicted are not there.

        Parameters
        ----------
        tokens : int
            How many have come.
        prompt : int
            How many of them came in one pass: ``P`` with full prefill, 0 with streaming prefill. `tokens` is not less.
        """
        if self.kind == "fp8":
            return tokens
        if self.kind == "quanto":
            first = min(tokens, max(1, prompt))
            return first + (tokens - first) // self.residual * self.residual
        every = self.residual if self.kind == "kivi" else self.group
        return tokens // every * every

    def coded_values(self, tokens: int, prompt: int) -> int:
        """Return the same for values."""
        if self.kind == "quanto":
            return self.coded_keys(tokens, prompt)
        return max(0, tokens - self.residual) if self.kind == "kivi" else tokens

    @property
    def whole(self) -> int:
        """How many of the first tokens are never codes."""
        return self.first if self.kind == "kvquant" else 0

    def stop(self, start: int, stop: int) -> int:
        """Return the end, at most `stop`, of the steps from `start` on that attend to the same keys as codes."""
        if self.per_token:
            return stop
        every = self.residual if self.kind == "kivi" else self.group
        return min(stop, (start // every + 1) * every)

    def _text(self, names: Iterable[str]) -> str:
        shown = ",".join(f"{name}={_written(name, getattr(self, name))}" for name in names)
        base = "fp8" if self.kind == "fp8" else f"int{self.bits}:{self.kind}"
        return f"{base}({shown})" if shown else base


def scheme_parts(text: str | Iterable[str]) -> list[str]:
    """Return the parts of a list of schemes; a comma within parentheses divides parameters."""
    return [part for one in ([text] if isinstance(text, str) else text) for part in re.split(r",(?![^(]*\))", one)]


def parse_caches(text: str | Iterable[str]) -> tuple[CacheScheme | None, ...]:
    """Return the schemes of a list such as ``16bit,int4:kivi(group=32,residual=64)``; None is a cache in 16 bit.

    Raises
    ------
    UsageError
        As `parse_cache`; if one is given twice.
    """
    parts = scheme_parts(text)
    found = tuple(parse_cache(part) for part in parts)
    if len(set(found)) < len(found):
        raise UsageError(f"--cache {','.join(parts)} names a cache twice", "Name each once.")
    return found


def parse_cache(text: str) -> CacheScheme | None:
    """Return a scheme from its text: ``int4:kivi``, ``int2:kivi(group=32,residual=64)``, ``fp8``; None is ``16bit``.

    Raises
    ------
    UsageError
        If it is not written like one, its kind or a parameter is unknown, or a parameter is out of its range.
    """
    written = text.strip().lower()
    if written in PLAIN:
        return None
    match = SHAPE.fullmatch(written)
    if match is None:
        raise UsageError(f"cache {text.strip()!r} is unknown", f"Use {KNOWN}.")
    kind = _kind("fp8" if match["fp8"] else match["kind"] or "kivi", text)
    bits = 8 if kind == "fp8" else int(match["bits"])
    if bits not in BITS[kind]:
        raise UsageError(f"cache {text.strip()!r} has codes of {bits} bits", f"Use {KNOWN}.")
    given = dict(_parameter(part, kind) for part in (match["given"] or "").split(",") if part.strip())
    scheme = CacheScheme(
        kind,
        bits,
        int(given.get("group", _default(kind, "group"))),
        int(given.get("residual", CacheScheme.residual)),
        given.get("outliers", CacheScheme.outliers),
        int(given.get("first", CacheScheme.first)),
    )
    if scheme.residual % scheme.group and kind == "kivi":
        raise UsageError(
            f"cache {scheme} has a residual of {scheme.residual}, which groups of {scheme.group} do not divide",
            "Give a residual that is a multiple of the group: int4:kivi(group=32,residual=128).",
        )
    return scheme


def _default(kind: Kind, name: str) -> float:
    """Return a parameter's value where none is given; transformers has groups of 64 channels."""
    return 64 if (kind, name) == ("quanto", "group") else float(getattr(CacheScheme, name))


def _kind(name: str, text: str) -> Kind:
    for kind in PARAMETERS:
        if kind == name:
            return kind
    raise UsageError(f"cache {text.strip()!r} is of an unknown kind {name!r}", f"Use {KNOWN}.")


def _parameter(part: str, kind: Kind) -> tuple[str, float]:
    """Return a parameter's name and value from ``group=32`` or ``outliers=1%``."""
    name, _, value = (side.strip() for side in part.partition("="))
    known = PARAMETERS[kind]
    if name not in known:
        what = f"Known: {', '.join(known)}." if known else f"Write {kind} alone."
        raise UsageError(f"a cache of kind {kind} has no parameter {name!r}", what)
    pattern, least = (r"\d+(\.\d+)?%|0?\.\d+|0", 0) if name == "outliers" else (r"\d{1,9}", 0 if name == "first" else 1)
    if not re.fullmatch(pattern, value):
        raise UsageError(
            f"{name}={value} of a cache is not in its range", f"Example: int4:{kind}({name}={_usual(name)})."
        )
    number = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    if number < least or (name == "outliers" and number >= 0.5):
        raise UsageError(
            f"{name}={value} of a cache is not in its range", f"Example: int4:{kind}({name}={_usual(name)})."
        )
    return name, number


def _usual(name: str) -> str:
    return _written(name, _default("kivi", name))


def _written(name: str, value: object) -> str:
    return f"{float(str(value)) * 100:g}%" if name == "outliers" else str(value)
