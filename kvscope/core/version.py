"""The version of kvscope, in a file of its own: a room that states it need not import the whole package."""

from __future__ import annotations

__version__ = "0.1.0"


def versions(*libraries: str) -> dict[str, str]:
    """Return the versions of kvscope and of installed libraries, for provenance.

    That of kvscope is its own statement, because a source tree on the path need not be installed.
    """
    from importlib.metadata import version  # slow to import, and not needed for the help

    return {"kvscope": __version__, **{name: version(name) for name in libraries}}
