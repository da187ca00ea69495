"""Presses of kvpress as policies: ``kvpress:SnapKVPress(window_size=32)``. Only the text is read here.

What a press retains is a function of the model's pass over the prompt with its full cache. It is computed once, before
anything is replayed, by running the press of the installed kvpress in the model (`kvscope.presses`), and is then
followed here: in the open loop, in the closed loop and in decoding. So this room needs neither kvpress nor a model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Phase, Policy, Step, Traits
from kvscope.policies.citation import Citation

PREFIX = "kvpress:"
EXAMPLE = "kvpress:SnapKVPress(window_size=32,kernel_size=5)"
# Presses that decide how many keys they retain, from the text or from ratios of their own.
OWN_SIZE = frozenset({"ComposedPress", "DMSPress", "PerLayerCompressionPress", "SimLayerKVPress"})
Value = object  # a number, a text, true, false, none, a press, or a list of these
Choices = Mapping[tuple[int, int], Mapping[int, Tensor]]  # (sequence, budget) -> layer -> bool [G, P]


@dataclass(frozen=True)
class PressCall:
    """A press as it is written: its class and arguments.

    Attributes
    ----------
    name : str
        Name of the class in kvpress.
    presses : tuple
        Arguments without a name: presses, and lists of them.
    settings : tuple of (str, object)
        Arguments with a name.
    """

    name: str
    presses: tuple[Value, ...] = ()
    settings: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        parts = [*map(_written, self.presses), *(f"{name}={_written(value)}" for name, value in self.settings)]
        return f"{self.name}({', '.join(parts)})"

    def nested(self) -> Iterator[PressCall]:
        """Yield the press, then all presses in its arguments."""
        yield self
        for value in (*self.presses, *(value for _, value in self.settings)):
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, PressCall):
                    yield from each.nested()

    def at_ratio(self, ratio: float) -> PressCall:
        """Return the press with a compression ratio of its own: that of the innermost press, which scores the keys."""
        given = (*self.presses, *(value for _, value in self.settings))
        if not any(isinstance(value, PressCall) for value in given):
            return replace(self, settings=(*self.settings, ("compression_ratio", ratio)))
        inner = tuple(each.at_ratio(ratio) if isinstance(each, PressCall) else each for each in self.presses)
        named = ((name, v.at_ratio(ratio) if isinstance(v, PressCall) else v) for name, v in self.settings)
        return replace(self, presses=inner, settings=tuple(named))

    @property
    def sized(self) -> bool:
        """Whether the press, or one in it, states how many keys it retains."""
        return any(
            call.name in OWN_SIZE or any(name.startswith("compression_ratio") for name, _ in call.settings)
            for call in self.nested()
        )


@dataclass(frozen=True)
class Press(Policy):
    """Retain what a press of kvpress retains at the end of the prompt, and all keys after it.

    Attributes
    ----------
    press : str
        The press with its arguments, as ``str(PressCall)`` writes it.
    choices : mapping or None
        Which keys of the prompt it retains, bool ``[G, P]`` for each sequence, budget in keys (0 for a press that
        states its own size) and layer; None until `kvscope.presses` has computed it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    phase: ClassVar[Phase] = "prefill"
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    published: ClassVar[bool] = True
    marks: ClassVar[bool] = True
    name: ClassVar[str] = "kvpress"
    paper: ClassVar[str] = "NVIDIA/kvpress"
    citation: ClassVar[Citation] = Citation(
        key="devoto2025expected",
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        authors="Devoto, Alessio and Jeblick, Maximilian and Jégou, Simon",
        year=2025,
        arxiv="2510.00636",
    )
    proven: ClassVar[str] = "kvpress itself, which is run"

    press: str
    choices: Choices | None = field(default=None, compare=False, repr=False)

    @property
    def call(self) -> PressCall:
        """The press and its arguments."""
        return parse_press(self.press)

    @property
    def traits(self) -> Traits:
        """Those of the class; a press that states its own size is held to no budget."""
        return self.with_traits(bounded=not self.call.sized)

    def parameters(self) -> dict[str, object]:
        return {"press": self.press}

    @property
    def label(self) -> str:
        """As on the command line: ``kvpress:SnapKVPress(window_size=32)``."""
        return PREFIX + self.press

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if not step.compresses:
            return score
        if self.choices is None:
            raise UsageError(
                f"{self.label} has no choice for this text: it is computed by the press inside the model",
                "Use kvscope replay, perplexity or verify, which run it.",
            )
        bounded = self.traits.bounded
        of_runs = [self.choices[step.sequence, budget if bounded else 0] for budget in step.budgets]
        kept = torch.stack([torch.stack([of[layer] for layer in step.layers.tolist()]) for of in of_runs])
        return torch.where(kept.to(score.device), score, -torch.inf)  # [R, L, G, P]


def parse_press(text: str) -> PressCall:
    """Return the press that a text writes as Python does: ``AdaKVPress(press=SnapKVPress(window_size=32))``.

    Nothing is executed. Raises UsageError for a text that is not a call, or has more than presses, lists and literal
    values as arguments, or a value without a name.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise _unreadable(text) from error
    made = _press(ast.Call(node, [], []) if isinstance(node, ast.Name) else node, text)
    if not isinstance(made, PressCall):
        raise _unreadable(text)
    return made


def _press(node: ast.expr, text: str) -> Value:
    """Return the value that a node writes; lists become tuples."""
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_press(each, text) for each in node.elts)
    if not isinstance(node, ast.Call):
        try:
            value: Value = ast.literal_eval(node)
        except ValueError as error:
            raise _unreadable(text) from error
        if not isinstance(value, bool | int | float | str | None):
            raise _unreadable(text)
        return value
    if not isinstance(node.func, ast.Name) or any(keyword.arg is None for keyword in node.keywords):
        raise _unreadable(text)
    presses = tuple(_press(each, text) for each in node.args)
    if not all(isinstance(each, PressCall | tuple) for each in presses):
        raise UsageError(
            f"{node.func.id} in {PREFIX}{text} has a value without a name", f"Name its parameters, as in {EXAMPLE}"
        )
    settings = tuple((str(keyword.arg), _press(keyword.value, text)) for keyword in node.keywords)
    return PressCall(node.func.id, presses, settings)


def _written(value: Value) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value) if isinstance(value, PressCall) else repr(value)


def _unreadable(text: str) -> UsageError:
    return UsageError(f"{PREFIX}{text} is not a press with its arguments", f"Write it as in Python: {EXAMPLE}")
