"""What counts as running out of memory, and the error that says so."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvscope.core.errors import KvscopeError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# What torch, CUDA, cuBLAS and the C++ library say where they raise a RuntimeError without a class of its own.
_SIGNS = ("out of memory", "not enough memory", "allocate memory", "bad alloc", "bad_alloc", "alloc_failed")
# What the loader of shared libraries says where a limit of this process leaves no addresses for them.
_NOT_LOADED = ("failed to map segment", "cannot allocate memory")
_NO_THREAD = "failed to launch worker thread"  # pyarrow, of an error of no class of its own
TORCH_BYTES = 800 * 10**6  # of addresses, of which torch needs 640 MB while it is loaded
ADVICE = "Use --device cpu, fewer policies or budgets at a time, or shorter texts."


class OutOfMemory(KvscopeError):
    """The memory of a device or of this machine is exceeded."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is exceeded: of a device, or of this machine."""
    if isinstance(error, MemoryError):  # also numpy's and pyarrow's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error).lower() for sign in _SIGNS)


def is_library_too_large(error: BaseException | None) -> bool:
    """Return whether an error, or one that it arose from, says that memory does not suffice to load a library."""
    while error is not None:
        if isinstance(error, (ImportError, OSError)) and any(sign in str(error).lower() for sign in _NOT_LOADED):
            return True
        if _NO_THREAD in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def require_addresses(needed: int, library: str) -> None:
    """Raise ImportError if a limit of this process leaves fewer bytes of addresses than a library needs.

    Where LLVM finds too little while it is loaded, it ends the process or never returns.
    """
    pages = Path("/proc/self/statm")
    if resource is None or not pages.exists():
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    used = int(pages.read_text().split()[0]) * resource.getpagesize()
    if limit - used < needed:
        raise ImportError(f"cannot allocate memory for {library}: {needed} bytes, {limit - used} are left")


class LimitedImports:
    """A finder of modules that finds none, but raises ImportError where a limit leaves torch too few addresses.

    Where torch finds too few while it is loaded, it ends the process.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ImportError if torch is to be imported and cannot be."""
        if name == "torch":
            require_addresses(TORCH_BYTES, name)


def out_of_memory(error: BaseException, work: str = "", todo: str = ADVICE) -> OutOfMemory:
    """Return the error for a user: what was done when memory was exceeded, and what to change."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OutOfMemory(f"out of memory{work}: {first.split('. ')[0]}", todo)


@contextmanager
def memory_explained(work: str, todo: str = ADVICE) -> Iterator[None]:
    """Turn an error that says that memory is exceeded into `OutOfMemory`; `work` says during what: `` in step 3``."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, work, todo) from error
