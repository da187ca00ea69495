"""Code of users inside kvscope: their modules, and where in them an error arose."""

from __future__ import annotations

from types import TracebackType

USER_FILE = "kvscope_user_"  # how the names of modules begin that are made of policy files
_KINDS: dict[str, str] = {}  # module outside kvscope -> what it defines: policy, metric, panel


def note_module(module: str, kind: str) -> None:
    """Remember that a module defines members of a kind, unless it is part of kvscope."""
    if not module.startswith("kvscope."):
        _KINDS.setdefault(module, kind)


def own_place(trace: TracebackType | None) -> str | None:
    """Return the innermost place of a traceback in code of a user, ``policy FILE:LINE``; None if there is none."""
    place = None
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        kind = "policy" if module.startswith(USER_FILE) else _KINDS.get(module)
        if kind is not None:
            place = f"{kind} {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
