"""A master key in HashiCorp Vault: its transit engine wraps and unwraps, and the key never leaves it.

Two calls of its HTTP interface are all that is needed (ADR 0085): `POST /v1/MOUNT/encrypt/KEY` and `…/decrypt/KEY`.
What is wrapped is the purpose and the secret together, so that a wrapped secret opens only as what it is with every
type of transit key. The token is read anew for each call, since agents replace it; it is in no message and no log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from blake3 import blake3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.records_pb2 import WrappedSecret

SCHEME: Final = "vault:"
CONTEXT_FINGERPRINT: Final = "holdfast v1 vault transit key fingerprint"

_FINGERPRINT_BYTES: Final = 8
_TIMEOUT_S: Final = 10.0
_ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_FORM: Final = "vault:https://HOST:8200/MOUNT/KEY"


@dataclass(frozen=True, slots=True)
class VaultKey:
    """Which transit key of which Vault.

    Attributes:
        host, port, encrypted: where it answers; plain text only on this machine.
        mount: path of the transit engine, e.g. `transit`.
        name: name of the key.
    """

    host: str
    port: int
    encrypted: bool
    mount: str
    name: str

    @property
    def fingerprint(self) -> bytes:
        """8 bytes that stand for engine and key. The address is not among them: it may change, the key stays."""
        told = f"{self.mount}/{self.name}".encode()
        return blake3(told, derive_key_context=CONTEXT_FINGERPRINT).digest(_FINGERPRINT_BYTES)


@dataclass(frozen=True, slots=True, repr=False)
class VaultToken:
    """Where the token comes from: a file that is read at each call, or else a text."""

    text: str = ""
    file: Path | None = None

    def read(self) -> str:
        """Return the token.

        Raises:
            HoldfastError: DENIED if there is none.
        """
        if not self.text and self.file is None:
            raise HoldfastError(ErrorCode.DENIED, "no token for Vault; set VAULT_TOKEN or VAULT_TOKEN_FILE")
        try:
            token = self.text if self.file is None else self.file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise HoldfastError(ErrorCode.DENIED, f"the file of Vault's token {self.file} cannot be read") from error
        # Checked here, because the HTTP client would quote a token with a line break in its error.
        if not token or not token.isascii() or not token.isprintable():
            raise HoldfastError(ErrorCode.DENIED, "what was given as Vault's token is no token")
        return token


def parse_vault_key(text: str) -> VaultKey:
    """Parse `vault:https://HOST:8200/MOUNT/KEY`.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it has another form, or would send secrets in plain text to another machine.
    """
    try:
        url = urlsplit(text.removeprefix(SCHEME))
        host, port = url.hostname or "", url.port or 8200
    except ValueError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text} is no address of Vault; {_FORM} is") from error
    mount, _, name = url.path.strip("/").rpartition("/")
    if url.scheme not in ("https", "http") or not host or not mount or not name or url.query or url.username:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text} names no key of Vault; {_FORM} does")
    if url.scheme == "http" and host not in _LOOPBACK:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"{text} would send secrets in plain text to another machine; use https"
        )
    return VaultKey(host, port, url.scheme == "https", mount, name)


class VaultMasterKey:
    """A `MasterKey` that lives in Vault."""

    def __init__(self, key: VaultKey, token: VaultToken, *, ca_file: Path | None = None) -> None:
        """Take the key's address; nothing is asked yet. `ca_file` holds the certificates that sign Vault's.

        Raises:
            HoldfastError: INVALID_ARGUMENT if the file holds no certificates.
        """
        self._key = key
        self._token = token
        self._tls: ssl.SSLContext | None = None
        if key.encrypted:
            try:
                self._tls = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
            except OSError as error:  # also what ssl raises for a file that holds something else
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT, f"VAULT_CACERT {ca_file} holds no certificates that can be read"
                ) from error

    @property
    def fingerprint(self) -> bytes:
        """8 bytes that stand for engine and key."""
        return self._key.fingerprint

    async def wrap(self, plain: bytes, purpose: str) -> WrappedSecret:
        """Wrap a secret for one purpose.

        Raises:
            HoldfastError: UNREACHABLE if Vault is away, sealed or a standby; DENIED if its token may not do this;
                NOT_FOUND without such an engine or key.
        """
        bound = base64.b64encode(_bound(purpose) + plain).decode()
        answer = await self._ask("encrypt", {"plaintext": bound})
        return WrappedSecret(master_fingerprint=self.fingerprint, ciphertext=_text(answer, "ciphertext").encode())

    async def unwrap(self, wrapped: WrappedSecret, purpose: str) -> bytes:
        """Return what was wrapped for `purpose`.

        Raises:
            HoldfastError: as `wrap`; KEY_MISMATCH if Vault's key does not open it; CORRUPT if it was wrapped for
                another purpose.
        """
        try:
            ciphertext = wrapped.ciphertext.decode("ascii")
        except UnicodeDecodeError as error:
            raise HoldfastError(ErrorCode.CORRUPT, f"the wrapped secret for {purpose} is malformed") from error
        answer = await self._ask("decrypt", {"ciphertext": ciphertext})
        try:
            plain = base64.b64decode(_text(answer, "plaintext"), validate=True)
        except binascii.Error as error:
            raise _nonsense() from error
        if not plain.startswith(_bound(purpose)):
            raise HoldfastError(ErrorCode.CORRUPT, f"the wrapped secret for {purpose} was wrapped for something else")
        return plain.removeprefix(_bound(purpose))

    async def _ask(self, verb: str, body: Mapping[str, str]) -> Mapping[str, Any]:
        path = f"/v1/{quote(self._key.mount)}/{verb}/{quote(self._key.name, safe='')}"
        loop = asyncio.get_running_loop()
        status, data = await loop.run_in_executor(None, partial(self._post, path, json.dumps(body), self._token.read()))
        if status == 200:
            return _data(data)
        where = f"Vault's key {self._key.mount}/{self._key.name}"
        if status == 403:
            raise HoldfastError(ErrorCode.DENIED, f"the token may not {verb} with {where}, or has ended")
        if status == 404:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no {where}")
        if status == 400 and verb == "decrypt":
            raise HoldfastError(
                ErrorCode.KEY_MISMATCH,
                f"{where} does not open this secret: another key of that name wrapped it, or a version of it that may "
                "not decrypt any more",
            )
        if status in (307, 412, 429) or status >= 500:
            raise HoldfastError(ErrorCode.UNREACHABLE, f"Vault answers {status}: it is sealed, a standby or overloaded")
        raise HoldfastError(ErrorCode.INTERNAL, f"Vault answers {status} when asked to {verb} with {where}")

    def _post(self, path: str, body: str, token: str) -> tuple[int, bytes]:
        """Make one call, in a worker thread: a status and a body."""
        key = self._key
        connection = (
            http.client.HTTPConnection(key.host, key.port, timeout=_TIMEOUT_S)
            if self._tls is None
            else http.client.HTTPSConnection(key.host, key.port, timeout=_TIMEOUT_S, context=self._tls)
        )
        try:
            headers = {"X-Vault-Token": token, "X-Vault-Request": "true", "Content-Type": "application/json"}
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(_ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException) as error:
            raise HoldfastError(
                ErrorCode.UNREACHABLE, f"Vault does not answer at {key.host}:{key.port}: {type(error).__name__}"
            ) from error
        finally:
            connection.close()


def _bound(purpose: str) -> bytes:
    return b"holdfast v1 " + purpose.encode() + b"\0"


def _data(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise _nonsense() from error
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict):
        raise _nonsense()
    return data


def _text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not value:
        raise _nonsense()
    return value


def _nonsense() -> HoldfastError:
    return HoldfastError(ErrorCode.UNREACHABLE, "what answers at Vault's address is not Vault")
