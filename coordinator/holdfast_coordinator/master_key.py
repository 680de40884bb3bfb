"""The master key as an operator names it: a file of 32 raw bytes or 64 hexadecimal digits, or a key of Vault."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from holdfast_coordinator.keys.master import FileMasterKey, MasterKey, MasterKeys
from holdfast_coordinator.keys.vault import SCHEME, VaultMasterKey, VaultToken, parse_vault_key
from holdfast_core.model.errors import ErrorCode, HoldfastError

MASTER_KEY_BYTES: Final = 32
MASTER_KEY_FILE: Final = "master.key"


def open_master_keys(
    named: str | None,
    old: str | None,
    *,
    data: Path | None,
    create: bool,
    has_metadata: bool,
    random_bytes: Callable[[int], bytes],
    environment: Mapping[str, str],
) -> MasterKeys:
    """Open the master key in force and those that secrets may still be wrapped by.

    Args:
        named: a file's path, or `vault:https://HOST:8200/MOUNT/KEY`; None for DATA/master.key.
        old: as `named`, several by comma; None for none.
        data: the coordinator's directory, if it has one.
        create: whether to make the file of `named` if there is none.
        has_metadata: whether `data` holds metadata already, which no new key would fit.
        random_bytes: source of keys and nonces.
        environment: where VAULT_TOKEN, VAULT_TOKEN_FILE and VAULT_CACERT are looked up.

    Raises:
        HoldfastError: INVALID_ARGUMENT if no place was named, or a wrong one; as `read_master_key` and
            `create_master_key`.
    """
    if not named and data is None:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "name the master key's file with --master-key, or --data")

    def opened(text: str, *, create: bool) -> MasterKey:
        if text.startswith(SCHEME):
            return _vault_key(text, environment)
        path = Path(text)
        # A new key would fit nothing that metadata which exists already holds.
        if not create or has_metadata:
            return FileMasterKey(read_master_key(path), random_bytes)
        make_directory(path.parent)
        return FileMasterKey(create_master_key(path, random_bytes=random_bytes), random_bytes)

    primary = opened(named or str((data or Path()) / MASTER_KEY_FILE), create=create)
    texts = [text.strip() for text in (old or "").split(",") if text.strip()]
    return MasterKeys(primary, [opened(text, create=False) for text in texts])


def _vault_key(text: str, environment: Mapping[str, str]) -> VaultMasterKey:
    token_file, ca_file = environment.get("VAULT_TOKEN_FILE"), environment.get("VAULT_CACERT")
    token = VaultToken(environment.get("VAULT_TOKEN", ""), Path(token_file) if token_file else None)
    return VaultMasterKey(parse_vault_key(text), token, ca_file=Path(ca_file) if ca_file else None)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are missing.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the directory {path} cannot be made: {error.strerror}"
        ) from error


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
