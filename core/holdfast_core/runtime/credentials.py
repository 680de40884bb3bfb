"""What a caller shows to a coordinator: an API token and the tenant it means; and where it is found (ADR 0077).

A token is `hft_`, 16 hexadecimal digits that name it, `_`, and 52 characters of base 32 that hold 32 secret bytes.
It is sent as `authorization: Bearer TEXT`. It is a secret: it is never in a repr, a log or an error.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_name
from holdfast_core.runtime.options import UNIX_SCHEME, is_loopback

AUTHORIZATION_KEY: Final = "authorization"
TENANT_KEY: Final = "holdfast-tenant"
TOKEN_VARIABLE: Final = "HOLDFAST_TOKEN"
TOKEN_FILE_VARIABLE: Final = "HOLDFAST_TOKEN_FILE"
TENANT_VARIABLE: Final = "HOLDFAST_TENANT"
HOME_VARIABLE: Final = "HOLDFAST_HOME"

TOKEN_SECRET_BYTES: Final = 32
_TOKEN_ID_BYTES: Final = 8
_PREFIX: Final = "hft_"
_HOST: Final = "127.0.0.1"
_TOKEN = re.compile(r"hft_([0-9a-f]{16})_([A-Z2-7]{52})\Z", re.ASCII)
_PADDING: Final = "===="

_Stamp = tuple[int, int, int]


def new_token(random_bytes: Callable[[int], bytes], token_id: str | None = None) -> str:
    """Return the text of a fresh token; `token_id` is drawn too unless it is given."""
    identity = random_bytes(_TOKEN_ID_BYTES).hex() if token_id is None else token_id
    secret = base64.b32encode(random_bytes(TOKEN_SECRET_BYTES)).decode("ascii").rstrip("=")
    return f"{_PREFIX}{identity}_{secret}"


def parse_token(text: str) -> tuple[str, bytes]:
    """Return a token's id and its 32 secret bytes.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it has another form; the text itself is not repeated.
    """
    match = _TOKEN.match(text)
    if match is None:
        raise _malformed("it is not hft_, 16 hexadecimal digits, _ and 52 characters of base 32")
    try:
        secret = base64.b32decode(match.group(2) + _PADDING)
    except binascii.Error:
        raise _malformed("its secret is no base 32") from None
    return match.group(1), secret


def _malformed(why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, f"this is no API token: {why}")


@dataclass(slots=True)
class Credential:
    """What goes with each call to a coordinator. Files are read again when they have changed.

    Attributes:
        token: the token that is sent; empty for none.
        token_file: file of the token; one that was named has to be there.
        tenant: name of the tenant that calls mean; empty lets the coordinator choose the only one there is.
        homes: files that may hold the token where none was named; the first that is there counts, and a cluster that
            starts later writes one later.
    """

    token: str = field(default="", repr=False)
    token_file: Path | None = None
    tenant: str = ""
    homes: tuple[Path, ...] = ()
    _stamp: _Stamp | None = field(default=None, repr=False)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata to send with a call.

        Raises:
            HoldfastError: UNAUTHENTICATED if the token's file was named and cannot be read or holds no token.
        """
        self._read_again()
        authorization = ((AUTHORIZATION_KEY, f"Bearer {self.token}"),) if self.token else ()
        return (*authorization, (TENANT_KEY, self.tenant)) if self.tenant else authorization

    def _read_again(self) -> None:
        if self.token_file is not None:
            try:
                self._take(self.token_file)
            except OSError as error:
                raise HoldfastError(
                    ErrorCode.UNAUTHENTICATED, f"the token file {self.token_file} cannot be read: {error.strerror}"
                ) from error
            return
        for path in self.homes:
            # Another user's home is as good as none.
            with contextlib.suppress(OSError):
                self._take(path)
                return
        if self.homes:
            self.token, self._stamp = "", None

    def _take(self, path: Path) -> None:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return
        text = path.read_text(encoding="ascii", errors="replace").strip()
        try:
            parse_token(text)
        except HoldfastError as error:
            raise HoldfastError(ErrorCode.UNAUTHENTICATED, f"the file {path} holds no token: {error.message}") from None
        self.token, self._stamp = text, stamp


def find_credential(
    addresses: Sequence[str],
    *,
    token: str | None = None,
    token_file: Path | None = None,
    tenant: str | None = None,
    certificate: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Credential:
    """Return the credential for the coordinators at `addresses`.

    A token that was given wins, then a file that was given, then HOLDFAST_TOKEN, then HOLDFAST_TOKEN_FILE, and for a
    coordinator on this machine the file that `holdfast up` keeps in the user's home. None of them: no token is sent.
    Who has a `certificate` is not at a cluster of `up`, and a token of one that was killed would only be in the way.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a malformed token or tenant.
    """
    name = tenant if tenant is not None else environment.get(TENANT_VARIABLE, "")
    if name:
        check_name(name, "tenant name")
    if token is None and token_file is None:
        token = environment.get(TOKEN_VARIABLE) or None
    if token is not None:
        parse_token(token)
        return Credential(token=token, tenant=name)
    named = environment.get(TOKEN_FILE_VARIABLE)
    if token_file is not None or named:
        return Credential(token_file=token_file or Path(named or ""), tenant=name)
    return Credential(tenant=name, homes=() if certificate else _files_at_home(addresses, environment))


def home_token_file(address: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return where `holdfast up` keeps the admin's token for its coordinator at HOST:PORT.

    `localhost` is another name of the 127.0.0.1 that `up` binds.

    Raises:
        RuntimeError: the user has no home.
    """
    named = environment.get(HOME_VARIABLE)
    home = Path(named) if named else Path.home() / ".holdfast"
    host, _, port = address.rpartition(":")
    return home / "tokens" / (f"{_HOST}:{port}" if host == "localhost" else address)


def _files_at_home(addresses: Sequence[str], environment: Mapping[str, str]) -> tuple[Path, ...]:
    local = [address for address in addresses if not address.startswith(UNIX_SCHEME) and is_loopback(address)]
    try:
        return tuple(home_token_file(address, environment) for address in local)
    except RuntimeError:
        # A number without an entry among the users, as containers run under.
        return ()


def write_token(path: Path, text: str) -> None:
    """Write a token's text to a file that its owner alone can read; an older file is replaced in one step.

    Raises:
        OSError: it cannot be written; an older file is still whole.
    """
    import tempfile  # whoever only reads tokens does not wait for this to load

    # A file of our own making, mode 0600 from the start: never one that somebody laid ready for us to fill.
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{text}\n")
        Path(aside).replace(path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise
