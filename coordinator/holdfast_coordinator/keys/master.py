"""The master keys that wrap every secret in the metadata store: one that wraps, and others that may still unwrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import master_fingerprint, unwrap_secret, wrap_secret
from holdfast_core.model.xaes import NONCE_BYTES
from holdfast_proto.v1.records_pb2 import WrappedSecret


class MasterKey(Protocol):
    """A key that wraps secrets; it may live in a file or in a key management service."""

    @property
    def fingerprint(self) -> bytes:
        """8 bytes by which it is recognised; they tell nothing else about it."""
        ...

    async def wrap(self, plain: bytes, purpose: str) -> WrappedSecret:
        """Wrap a secret for one purpose.

        Raises:
            HoldfastError: UNREACHABLE or DENIED, as the service that holds the key says.
        """
        ...

    async def unwrap(self, wrapped: WrappedSecret, purpose: str) -> bytes:
        """Return what was wrapped for `purpose`.

        Raises:
            HoldfastError: KEY_MISMATCH if another key wrapped it; CORRUPT if it was altered or is for another purpose;
                UNREACHABLE or DENIED, as the service that holds the key says.
        """
        ...


class FileMasterKey:
    """A master key of 32 bytes in this process's memory."""

    def __init__(self, key: bytes, random_bytes: Callable[[int], bytes]) -> None:
        """Take the key. Raises INVALID_ARGUMENT if it is not 32 bytes."""
        self._key = key
        self._random_bytes = random_bytes
        self._fingerprint = master_fingerprint(key)

    @property
    def fingerprint(self) -> bytes:
        """8 bytes by which the key is recognised."""
        return self._fingerprint

    async def wrap(self, plain: bytes, purpose: str) -> WrappedSecret:
        """Wrap a secret for one purpose."""
        return wrap_secret(self._key, plain, purpose, self._random_bytes(NONCE_BYTES))

    async def unwrap(self, wrapped: WrappedSecret, purpose: str) -> bytes:
        """Return what was wrapped for `purpose`. Raises KEY_MISMATCH or CORRUPT."""
        return unwrap_secret(self._key, wrapped, purpose)


class MasterKeys:
    """The master key in force, and older ones that secrets may still be wrapped by."""

    def __init__(self, primary: MasterKey, others: Sequence[MasterKey] = ()) -> None:
        self._primary = primary
        self._by_fingerprint = {key.fingerprint: key for key in (*others, primary)}

    @property
    def fingerprint(self) -> bytes:
        """Fingerprint of the key that wraps."""
        return self._primary.fingerprint

    async def wrap(self, plain: bytes, purpose: str) -> WrappedSecret:
        """Wrap by the key in force. Raises as `MasterKey.wrap`."""
        return await self._primary.wrap(plain, purpose)

    async def unwrap(self, wrapped: WrappedSecret, purpose: str) -> bytes:
        """Unwrap by whichever key wrapped it.

        Raises:
            HoldfastError: KEY_MISMATCH, with the fingerprints expected and given, if none of them did; as
                `MasterKey.unwrap`.
        """
        key = self._by_fingerprint.get(wrapped.master_fingerprint)
        if key is None:
            expected = wrapped.master_fingerprint.hex()
            given = ", ".join(sorted(fingerprint.hex() for fingerprint in self._by_fingerprint))
            raise HoldfastError(
                ErrorCode.KEY_MISMATCH,
                f"this cluster's secrets are wrapped by the master key with fingerprint {expected}; the one given has "
                f"{given}. Start with the right one",
                facts={"expected": expected, "given": given},
            )
        return await key.unwrap(wrapped, purpose)
