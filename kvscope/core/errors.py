"""Every error that a user's input can cause.

    KvscopeError            exit status 1: what is wrong, and what to do about it
    ├── UsageError          exit status 2: an unknown name, a bad parameter, a bad budget
    ├── TraceError          a trace is missing, damaged, incomplete, of another version, or lacks a signal
    ├── ModelError          a model cannot be found, loaded or observed
    ├── ReplayError         a replay that cannot give valid results
    ├── ShareError          a packed file, or a trace or replay on another machine, that cannot be read or is damaged
    ├── ResultError         a results file is missing, damaged, or not comparable
    └── OutputExists        the output exists already

Any other exception is a defect of kvscope and is shown with its traceback.
"""

from enum import IntEnum

RECORD_ONE = "Try kvscope demo, or record one of a text file: kvscope trace --model demo FILE"
REPLAY_COMMAND = "kvscope replay --policy h2o --policy tova"  # suggested where a replay is missing


class ExitStatus(IntEnum):
    """Exit status of the command line."""

    ok = 0
    error = 1
    usage = 2
    difference = 3  # `diff` found a regression, `verify` a difference
    interrupted = 130


class KvscopeError(Exception):
    """An error that a user's input causes: one line says what is wrong, and one line what to do.

    Parameters
    ----------
    what : str
        What is wrong, with the value and the path.
    todo : str
        What the user can do.
    """

    exit_status = ExitStatus.error

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(what if not todo else f"{what}\n{todo}")
        self.what = what
        self.todo = todo

    def __reduce__(self) -> tuple[type["KvscopeError"], tuple[str, ...]]:
        return type(self), (self.what, self.todo)


class UsageError(KvscopeError):
    """An input that cannot be used: an unknown name, an invalid parameter or budget. Exit status 2."""

    exit_status = ExitStatus.usage


class TraceError(KvscopeError):
    """A trace that is missing, damaged, incomplete, of another version, or lacks a signal."""


class ModelError(KvscopeError):
    """A model that cannot be found or loaded, or whose attention cannot be recorded."""


class ReplayError(KvscopeError):
    """A replay that cannot give valid results."""


class ResultError(KvscopeError):
    """A results file that is missing, damaged, or not comparable."""


class ShareError(KvscopeError):
    """A packed file, or a trace or replay on another machine, that cannot be read or is damaged."""


class OutputExists(KvscopeError):
    """The output exists already.

    Parameters
    ----------
    path : str
        The folder or file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} exists already", "Give another name with -o, or replace it with --force.")
        self.path = path

    def __reduce__(self) -> tuple[type[KvscopeError], tuple[str, ...]]:
        return type(self), (self.path,)
