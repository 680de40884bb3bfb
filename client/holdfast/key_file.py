"""Files of keys on this machine: read whole, made for their owner alone, and never half written.

They are on disk with their directory entry before a call returns: nothing may be sealed under a key that a power cut
takes away.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.key_file import DataKey, format_data_key, new_data_key, parse_data_key
from holdfast_core.model.keys import master_fingerprint
from holdfast_core.model.xaes import KEY_BYTES

_FILE_BYTES_MAX: Final = 1024 * 1024


def read_key_file(path: Path) -> DataKey:
    """Read a tenant's data key.

    Raises:
        HoldfastError: NOT_FOUND if there is no such file; INVALID_ARGUMENT if it cannot be read or holds no data key.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(_FILE_BYTES_MAX).decode("utf-8")
    except FileNotFoundError as error:
        raise HoldfastError(
            ErrorCode.NOT_FOUND, f"there is no data key at {path}; `holdfast keys make-data` makes one"
        ) from error
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the data key {path} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{path} holds no data key") from error
    return parse_data_key(text, str(path))


def make_data_key(path: Path, *, random_bytes: Callable[[int], bytes]) -> DataKey:
    """Make a data key in a new file.

    Raises:
        HoldfastError: TARGET_EXISTS if there is one; TARGET_UNWRITABLE.
    """
    key = new_data_key(random_bytes)
    _write_new(path, format_data_key(key), random_bytes)
    return key


def rotate_data_key(path: Path, *, random_bytes: Callable[[int], bytes]) -> DataKey:
    """Add an epoch to the key in a file, which is replaced at once; every other copy of it must follow.

    Raises:
        HoldfastError: as `read_key_file`; TARGET_UNWRITABLE.
    """
    # The file itself, where the path is a symbolic link: the link would otherwise be replaced by a file.
    path = path.resolve()
    key = read_key_file(path).rotated(random_bytes)
    aside = _aside(path, random_bytes)
    try:
        _write(aside, format_data_key(key))
        aside.replace(path)
        _sync_folder(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    return key


def make_master_key(path: Path, *, random_bytes: Callable[[int], bytes]) -> bytes:
    """Make a master key in a new file, as 64 hexadecimal digits; return its fingerprint.

    Raises:
        HoldfastError: TARGET_EXISTS if there is one; TARGET_UNWRITABLE.
    """
    key = random_bytes(KEY_BYTES)
    _write_new(path, key.hex() + "\n", random_bytes)
    return master_fingerprint(key)


def _write_new(path: Path, text: str, random_bytes: Callable[[int], bytes]) -> None:
    # Written aside and linked into place: nobody ever reads half a key, and an existing one is never replaced.
    aside = _aside(path, random_bytes)
    try:
        _write(aside, text)
        try:
            os.link(aside, path)
        finally:
            aside.unlink()
        _sync_folder(path)
    except FileExistsError as error:
        raise HoldfastError(
            ErrorCode.TARGET_EXISTS, f"{path} exists; a key is never replaced, name another file"
        ) from error
    except OSError as error:
        raise _unwritable(path, error) from error


def _aside(path: Path, random_bytes: Callable[[int], bytes]) -> Path:
    return path.with_name(f".{path.name}.{random_bytes(8).hex()}")


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> HoldfastError:
    return HoldfastError(ErrorCode.TARGET_UNWRITABLE, f"the key {path} cannot be written: {error.strerror}")
