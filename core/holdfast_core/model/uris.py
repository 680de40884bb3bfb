"""Volume URIs: what a VM's registration may name as the source of a volume.

| form | what it is |
| --- | --- |
| `PATH`, `file:PATH` | a raw file or block device |
| `qcow2:PATH[?tracking=off]` | a qcow2 image that no VM runs on |
| `nbd://HOST[:PORT][/EXPORT]` | an export of an NBD server |
| `nbd+unix:///[EXPORT]?socket=PATH` | the same over a Unix socket |
| `qmp:SOCKET?device=NAME[&agent=SOCKET][&scratch=DIR]` | a disk of a running QEMU |
| `memdiff:PATH?since=POINT` | a sparse file with what changed in a VM's memory since a point |

The forms of NBD are those of its `doc/uri.md`. Parameters are percent-encoded; so is a path that follows
a scheme. Paths stay as given: which folder a relative one begins at is for the reader to know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id

URI_CHARS_MAX: Final = 4096
NBD_PORT: Final = 10809
EXPORT_NAME_BYTES_MAX: Final = 4096

_PARAMETERS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "file": frozenset(),
        "qcow2": frozenset({"tracking"}),
        "nbd": frozenset(),
        "nbd+unix": frozenset({"socket"}),
        "qmp": frozenset({"device", "agent", "scratch"}),
        "memdiff": frozenset({"since"}),
    }
)
_NEEDED: Final[Mapping[str, str]] = MappingProxyType({"nbd+unix": "socket", "qmp": "device", "memdiff": "since"})
_HOST: Final = re.compile(r"[A-Za-z0-9._:-]+\Z", re.ASCII)
_PATH_PARAMETERS: Final = frozenset({"agent", "scratch"})
_LIVE: Final = frozenset({"file", "nbd", "nbd+unix"})


@dataclass(frozen=True, slots=True)
class VolumeUri:
    """A parsed volume URI.

    Attributes:
        scheme: "file", "qcow2", "nbd", "nbd+unix", "qmp" or "memdiff".
        path: path of the image, of the memory file or of the socket, as given; empty for "nbd".
        parameters: what follows the question mark, decoded, by name; the socket of "nbd+unix" is the path instead.
        host: of "nbd", without brackets.
        port: of "nbd".
        export: name of the export of "nbd" and "nbd+unix"; empty for the server's default.
    """

    scheme: str
    path: str
    parameters: tuple[tuple[str, str], ...] = ()
    host: str = ""
    port: int = 0
    export: str = ""

    def parameter(self, name: str) -> str:
        """Return a parameter, empty if it was not given."""
        return dict(self.parameters).get(name, "")

    def with_paths(self, made: Callable[[str], str]) -> VolumeUri:
        """Return it with each path of this machine that it names replaced by what `made` returns for it."""
        return replace(
            self,
            path=made(self.path) if self.path else "",
            parameters=tuple(
                (name, made(value) if name in _PATH_PARAMETERS else value) for name, value in self.parameters
            ),
        )

    def __str__(self) -> str:
        """The URI; `parse_volume_uri` reads it back as the same."""
        pairs = self.parameters
        if self.scheme == "nbd":
            host = f"[{self.host}]" if ":" in self.host else self.host
            port = "" if self.port == NBD_PORT else f":{self.port}"
            text = f"nbd://{host}{port}/{quote(self.export)}"
        elif self.scheme == "nbd+unix":
            text = f"nbd+unix:///{quote(self.export)}"
            pairs = (("socket", self.path), *pairs)
        else:
            if self.scheme == "file" and _is_plain(self.path):
                return self.path
            # Two slashes at the beginning would be read as a host.
            path = "/" + self.path.lstrip("/") if self.path.startswith("//") else self.path
            text = f"{self.scheme}:{quote(path)}"
        return text + "".join(f"{'&' if at else '?'}{name}={quote(value)}" for at, (name, value) in enumerate(pairs))


def parse_volume_uri(text: str) -> VolumeUri:
    """Parse a path or a URI of one of the forms above.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty, too long, of an unknown scheme or not of its scheme's form.
    """
    if not text:
        raise _refused("the volume's URI is empty; give the path of a raw image")
    if len(text) > URI_CHARS_MAX:
        raise _refused(f"the volume's URI has {len(text)} characters; {URI_CHARS_MAX} are allowed")
    if "\0" in text:
        raise _refused("the volume's URI holds a zero byte")
    if _is_plain(text):
        return VolumeUri("file", text)
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme in ("nbds", "nbds+unix"):
        raise _refused(
            f"the volume's URI {text!r} asks for NBD over TLS, which is not supported; use nbd+unix:, or nbd: through "
            "a tunnel of your own"
        )
    if scheme not in _PARAMETERS:
        raise _refused(
            f"the volume's URI {text!r} has the unknown scheme {scheme}:; a path that begins so is written ./{text}"
        )
    if scheme in ("nbd", "nbd+unix"):
        return _nbd(text, scheme)
    # A path after `file:` alone was always taken whole.
    whole = scheme == "file" and not rest.startswith("//")
    given, _, query = (rest, "", "") if whole else rest.partition("?")
    if "#" in rest and not whole:
        raise _refused(f"the volume's URI {text!r} has a fragment; a # in a path is written %23")
    parameters = _parameters(text, scheme, query)
    return VolumeUri(scheme, _local_path(text, given), tuple(parameters.items()))


def check_volume_uri(text: str, *, live: bool) -> VolumeUri:
    """Return the parsed URI if a volume can be registered with it.

    Raises:
        HoldfastError: INVALID_ARGUMENT as `parse_volume_uri`, or if it is to be read live and cannot be.
    """
    uri = parse_volume_uri(text)
    if live and uri.scheme not in _LIVE:
        raise _refused(
            f"the volume {text!r} cannot be registered as live: qmp: freezes a running VM's disks by itself, and a "
            "qcow2 image or a memory file can be read only while nobody writes it"
        )
    return uri


def _is_plain(text: str) -> bool:
    """Whether it is a path and no URI: a path may hold a colon, and a scheme holds no separator before its own."""
    scheme, colon, _ = text.partition(":")
    return not colon or "/" in scheme or not scheme


def _local_path(text: str, given: str) -> str:
    """Return the decoded path of `PATH`, `///PATH` or `//localhost/PATH`."""
    if given.startswith("//"):
        host, slash, below = given[2:].partition("/")
        if host not in ("", "localhost"):
            raise _refused(f"the volume's URI {text!r} names the host {host}; only local files can be read")
        given = slash + below
    path = unquote(given)
    if not path or "\0" in path:
        raise _refused(f"the volume's URI {text!r} names no path")
    return path


def _nbd(text: str, scheme: str) -> VolumeUri:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", NBD_PORT if parts.port is None else parts.port
    except ValueError as error:
        raise _refused(f"the volume's URI {text!r} is not of NBD's form: {error}") from error
    if parts.username is not None or parts.fragment or not text.partition(":")[2].startswith("//"):
        raise _refused(f"the volume's URI {text!r} is not of the form {scheme}://HOST:PORT/EXPORT")
    export = unquote(parts.path.removeprefix("/"))
    if "\0" in export or len(export.encode("utf-8", "surrogateescape")) > EXPORT_NAME_BYTES_MAX:
        raise _refused(f"the volume's URI {text!r} names an export that NBD cannot name")
    parameters = _parameters(text, scheme, parts.query)
    if scheme == "nbd+unix":
        if parts.netloc:
            raise _refused(f"the volume's URI {text!r} names a host and a socket; write nbd+unix:///EXPORT?socket=PATH")
        return VolumeUri(scheme, parameters.pop("socket"), tuple(parameters.items()), export=export)
    if not _HOST.match(host) or port == 0:
        raise _refused(f"the volume's URI {text!r} names no host; write nbd://HOST:PORT/EXPORT")
    return VolumeUri(scheme, "", tuple(parameters.items()), host, port, export)


def _parameters(text: str, scheme: str, query: str) -> dict[str, str]:
    """Return the decoded parameters, in the order of their names."""
    found: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in _PARAMETERS[scheme]:
            known = ", ".join(sorted(_PARAMETERS[scheme]))
            raise _refused(
                f"the volume's URI {text!r} has the parameter {name!r}; {scheme}: takes {known or 'none'}"
                + (" (a question mark in a path is written %3F)" if scheme in ("file", "qcow2", "memdiff") else "")
            )
        if name in found or not unquote(value) or "\0" in unquote(value):
            raise _refused(f"the volume's URI {text!r} gives {name} no value, or gives it twice")
        found[name] = unquote(value)
    needed = _NEEDED.get(scheme)
    if needed is not None and needed not in found:
        raise _refused(f"the volume's URI {text!r} lacks {needed}=…, which {scheme}: needs")
    if found.get("tracking", "off") != "off":
        raise _refused(f"the volume's URI {text!r} says tracking={found['tracking']}; off is the only choice")
    if "since" in found:
        check_id(found["since"], "point id after since=")
    return dict(sorted(found.items()))


def _refused(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, message)
