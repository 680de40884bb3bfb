"""Volume URIs: what a VM's registration may name as the source of a volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from holdfast_core.model.errors import ErrorCode, HoldfastError

URI_CHARS_MAX: Final = 4096
_KNOWN_LATER: Final = frozenset({"qcow2", "nbd", "nbd+unix", "qmp", "memdiff"})


@dataclass(frozen=True, slots=True)
class VolumeUri:
    """A parsed volume URI.

    Attributes:
        scheme: "file", the only one so far.
        path: path of the raw image, as given; relative ones are the reader's to resolve.
    """

    scheme: str
    path: str


def parse_volume_uri(text: str) -> VolumeUri:
    """Parse a path, or a `file:` URI (`file:PATH`, `file:///PATH`, `file://localhost/PATH`).

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty, too long, names another host, carries a query or a fragment, or
            has a scheme that is unknown or not supported yet.
    """
    if not text:
        raise _refused("the volume's URI is empty; give the path of a raw image")
    if len(text) > URI_CHARS_MAX:
        raise _refused(f"the volume's URI has {len(text)} characters; {URI_CHARS_MAX} are allowed")
    if "\0" in text:
        raise _refused("the volume's URI holds a zero byte")
    scheme, colon, rest = text.partition(":")
    # A path may hold a colon; a scheme holds no separator before its own.
    if not colon or "/" in scheme or not scheme:
        return VolumeUri("file", text)
    scheme = scheme.lower()
    if scheme in _KNOWN_LATER:
        raise _refused(f"volumes of the kind {scheme}: are not supported yet; give the path of a raw image")
    if scheme != "file":
        raise _refused(
            f"the volume's URI {text!r} has the unknown scheme {scheme}:; a path that begins so is written ./{text}"
        )
    return VolumeUri("file", _file_path(text, rest))


def _file_path(text: str, rest: str) -> str:
    if not rest.startswith("//"):
        path = unquote(rest)
    else:
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise _refused(f"the volume's URI {text!r} names the host {parts.netloc}; only local files can be read")
        if parts.query or parts.fragment:
            raise _refused(f"the volume's URI {text!r} has a query or fragment, which a file has not")
        path = unquote(parts.path)
    if not path or "\0" in path:
        raise _refused(f"the volume's URI {text!r} names no path")
    return path


def _refused(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, message)
