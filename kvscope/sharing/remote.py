"""Read files from another machine: ``https://`` and ``http://`` with the standard library, all else with fsspec."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from kvscope.core.errors import KvscopeError, ShareError
from kvscope.core.version import __version__

TIMEOUT = 60  # seconds without an answer or a byte
WEB = ("https", "http")
_NETWORK = "Check the address and the network."
_ACCESS = {
    "s3": "Check your credentials: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    "hf": "Check your access: hf auth login, or HF_TOKEN.",
}


class NotThere(ShareError):
    """A file that does not exist on the other machine."""


def is_remote(given: str) -> bool:
    """Return whether a name is the address of a file or a folder, as ``s3://...``, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", given) is not None


def scheme_of(url: str) -> str:
    """Return the protocol of an address: ``s3``, ``https``."""
    return url.partition("://")[0].lower()


def shown(url: str) -> str:
    """Return an address for messages: without the password and the query, which may be a signature."""
    without = re.sub(r"://[^/@]*@", "://", url)
    return re.sub(r"[?#].*", "", without) if scheme_of(url) in WEB else without


def last_part(url: str) -> str:
    """Return the last part of the path of an address: the name of its file or folder."""
    path = unquote(urlsplit(url).path) if scheme_of(url) in WEB else url.partition("://")[2]
    return path.rstrip("/").rpartition("/")[2]


def member(url: str, name: str) -> str:
    """Return the address of a file in a folder."""
    if scheme_of(url) not in WEB:
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name, safe='/=')}"))


def require_address(url: str) -> None:
    """Raise ShareError for an address that names nothing, or of the web with no valid machine or port."""
    try:
        valid = bool(url.partition("://")[2].strip("/"))
        valid = valid and (scheme_of(url) not in WEB or (bool(urlsplit(url).hostname) and urlsplit(url).port != 0))
    except ValueError:
        valid = False
    if not valid:
        raise ShareError(f"{url} is not an address", f"Write the full address: {scheme_of(url)}://PLACE/PATH")


class RemoteFile:
    """An open file of another machine; every error of reading it is a ShareError."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self._stream, self._url = stream, url

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        with explained(self._url):
            return self._stream.read(size)


@contextmanager
def opened(url: str) -> Iterator[RemoteFile]:
    """Open a file to be read from its first byte on.

    Raises
    ------
    NotThere
        If there is no such file.
    ShareError
        If it cannot be reached or may not be read, or if the package that reads such addresses is not installed.
    """
    require_address(url)
    with explained(url):
        stream = _open_web(url) if scheme_of(url) in WEB else _open_other(url)
    try:
        yield RemoteFile(stream, url)
    finally:
        with explained(url):
            stream.close()


def read_address(url: str, most: int) -> bytes:
    """Return the content of a file of another machine, no more than its first `most` bytes; errors as `opened`."""
    parts, left = [], most
    with opened(url) as stream:
        while left and (part := stream.read(min(left, 2**20))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn every error of reading an address into a ShareError; libraries raise errors of many kinds."""
    try:
        yield
    except (KvscopeError, MemoryError):
        raise
    except Exception as error:
        raise _explanation(error, url) from error


def _explanation(error: Exception, url: str) -> ShareError:
    """Return the two lines for an error of a library that reads from other machines."""
    name, scheme, status = shown(url), scheme_of(url), _status(error)
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it has the connection
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return NotThere(f"there is no {name}", "Check the address; where it is private, check your access to it.")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return ShareError(f"{name} may not be read: {_said(error)}", _ACCESS.get(scheme, "Check your access to it."))
    if isinstance(error, IsADirectoryError):
        return NotThere(f"{name} is a folder, not a file", "Check the address.")
    return ShareError(f"{name} cannot be read: {_said(error)}", _NETWORK)


def _status(error: Exception) -> int | None:
    """Return the status of an answer that a library raised as an error."""
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _said(error: Exception) -> str:
    """Return the first line of an error; of one that wraps another, of that one."""
    wraps = isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError)
    inner = getattr(error, "reason", error) if wraps else error
    return (str(inner).strip() or type(inner).__name__).splitlines()[0]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not from https to something that others can change on the way."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if scheme_of(req.full_url) == "https" else WEB
        if scheme_of(newurl) not in allowed:
            fp.close()
            raise ShareError(
                f"{shown(req.full_url)} leads to {shown(newurl)}", "Use an address that begins with https."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open_web(url: str) -> BinaryIO:
    parts = urlsplit(url)
    encoded = urlunsplit(parts._replace(path=quote(parts.path, safe="/%:@!$&'()*+,;=~")))
    request = urllib.request.Request(encoded, headers={"User-Agent": f"kvscope/{__version__}"})
    return cast(BinaryIO, urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT))


def _open_other(url: str) -> BinaryIO:
    import fsspec
    from fsspec.registry import known_implementations

    scheme = scheme_of(url)
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = (
            str(known_implementations[scheme]["class"]).partition(".")[0] if scheme in known_implementations else ""
        )
        raise ShareError(
            f"{scheme}:// needs a package that is not installed: {_said(error)}",
            f"Install it: pip install {package or scheme}",
        ) from error
    except ValueError as error:
        if scheme in fsspec.available_protocols():
            raise
        raise ShareError(
            f"{url} has an unknown protocol, {scheme}", "Use s3://, hf://, https://, or another protocol of fsspec."
        ) from error
    files.invalidate_cache()  # another process may have changed what this one has listed
    return cast(BinaryIO, files.open(path, "rb"))
