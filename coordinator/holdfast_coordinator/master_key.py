"""The master key's file: 32 raw bytes, or the same as 64 hexadecimal digits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

MASTER_KEY_BYTES: Final = 32


def read_master_key(path: Path) -> bytes:
    """Read the master key.

    Raises:
        HoldfastError: NOT_FOUND if there is no such file; INVALID_ARGUMENT if it cannot be read or holds no key.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise HoldfastError(
            ErrorCode.NOT_FOUND,
            f"there is no master key at {path}; name the file with --master-key, or make one with --create-master-key",
        ) from error
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the master key {path} cannot be read: {error.strerror}"
        ) from error
    return parse_master_key(data, str(path))


def parse_master_key(data: bytes, where: str) -> bytes:
    """Return the 32 bytes that `data` holds raw or as hexadecimal text; `where` names its source in the message.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is neither.
    """
    if len(data) == MASTER_KEY_BYTES:
        return data
    text = data.strip()
    if len(text) == 2 * MASTER_KEY_BYTES:
        try:
            return bytes.fromhex(text.decode("ascii"))
        except ValueError as error:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"the master key {where} has 64 characters that are not hexadecimal"
            ) from error
    raise HoldfastError(
        ErrorCode.INVALID_ARGUMENT,
        f"the master key {where} has {len(data)} bytes; it takes 32 raw bytes or 64 hexadecimal digits",
    )


def create_master_key(path: Path, *, random_bytes: Callable[[int], bytes]) -> bytes:
    """Make a master key, readable by its owner alone, unless the file exists; return the file's key.

    It is on disk with its directory entry before this returns: a cluster must never be made under a key that a power
    cut takes away. Of two that make it at once, both return the winner's.

    Raises:
        HoldfastError: as `read_master_key`; INVALID_ARGUMENT if it cannot be written.
    """
    if path.exists():
        return read_master_key(path)
    key = random_bytes(MASTER_KEY_BYTES)
    # Written aside and linked into place: nobody ever reads half a key, and an existing one is never replaced.
    aside = path.with_name(f".{path.name}.{random_bytes(8).hex()}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return read_master_key(path)
        finally:
            aside.unlink()
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the master key {path} cannot be made: {error.strerror}"
        ) from error
    return key
