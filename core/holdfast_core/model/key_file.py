"""The data key that a tenant keeps itself: its form in a file, and what it adds to the keys of a grant.

The file is one JSON object: `{"format": "holdfast tenant data key 1", "root": "HEX64", "epochs": {"1": "HEX64"}}`
(docs/formats.md). Who loses it loses the tenant's data, and nobody else can open that. Left out: reading and writing
the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from blake3 import blake3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.xaes import KEY_BYTES
from holdfast_proto.v1.common_pb2 import TenantKeys

FORMAT: Final = "holdfast tenant data key 1"
CONTEXT_FINGERPRINT: Final = "holdfast v1 tenant data key fingerprint"

_FINGERPRINT_BYTES: Final = 8
_EPOCH_MAX: Final = 2**32 - 1
_FIELDS: Final = frozenset({"format", "root", "epochs"})


@dataclass(frozen=True, slots=True, repr=False)
class DataKey:
    """A tenant's data secret.

    Attributes:
        root: 32 bytes that stay for good.
        epochs: 32 bytes by key epoch, at least one; the newest seals.
    """

    root: bytes
    epochs: Mapping[int, bytes]

    def __post_init__(self) -> None:
        """Freeze the mapping and check it. Raises ValueError if a secret or an epoch is out of its range."""
        object.__setattr__(self, "epochs", MappingProxyType(dict(sorted(self.epochs.items()))))
        if not self.epochs or not all(1 <= epoch <= _EPOCH_MAX for epoch in self.epochs):
            raise ValueError("a data key has at least one epoch, from 1 on")
        if any(len(secret) != KEY_BYTES for secret in (self.root, *self.epochs.values())):
            raise ValueError(f"every secret takes {KEY_BYTES} bytes")

    def __repr__(self) -> str:
        return f"DataKey({self.fingerprint.hex()}, epochs={list(self.epochs)})"

    @property
    def fingerprint(self) -> bytes:
        """8 bytes by which the key is recognised, in every epoch; they tell nothing else about it."""
        return blake3(self.root, derive_key_context=CONTEXT_FINGERPRINT).digest(_FINGERPRINT_BYTES)

    @property
    def newest(self) -> int:
        """The epoch that seals."""
        return max(self.epochs)

    def rotated(self, random_bytes: Callable[[int], bytes]) -> DataKey:
        """Return the key with a new epoch."""
        return DataKey(self.root, {**self.epochs, self.newest + 1: random_bytes(KEY_BYTES)})

    def merged(self, keys: TenantKeys) -> TenantSecrets:
        """Return the secrets of a grant, which has the structure secret alone, with this data secret.

        Raises:
            HoldfastError: KEY_MISMATCH if the grant has a data secret: the tenant's is not kept in a file; CORRUPT.
        """
        granted = TenantSecrets.from_message(keys)
        if granted.data_root is not None:
            raise HoldfastError(
                ErrorCode.KEY_MISMATCH,
                "this tenant's data key is kept by the cluster, so a file of one fits nothing here; leave --key-file "
                "(HOLDFAST_KEY_FILE) out, or name another --tenant",
            )
        return TenantSecrets(granted.tenant, self.root, self.epochs, granted.structure_root, granted.structure_epochs)


def new_data_key(random_bytes: Callable[[int], bytes]) -> DataKey:
    """Make a data key at epoch 1, from a source of random bytes such as `os.urandom`."""
    return DataKey(random_bytes(KEY_BYTES), {1: random_bytes(KEY_BYTES)})


def format_data_key(key: DataKey) -> str:
    """Return what a file holds of the key, with the line's end."""
    epochs = {str(epoch): secret.hex() for epoch, secret in key.epochs.items()}
    return json.dumps({"format": FORMAT, "root": key.root.hex(), "epochs": epochs}, indent=2) + "\n"


def parse_data_key(text: str, where: str) -> DataKey:
    """Parse what a file holds; `where` names the file in messages.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is no data key; nothing of what it holds is quoted.
    """
    try:
        document = json.loads(text, object_pairs_hook=_once)
        if not isinstance(document, dict) or set(document) != _FIELDS or document["format"] != FORMAT:
            raise ValueError("other fields than those of a data key")
        epochs = document["epochs"]
        if not isinstance(epochs, dict):
            raise ValueError("the epochs are no object")
        return DataKey(_secret(document["root"]), {_epoch(name): _secret(value) for name, value in epochs.items()})
    except (ValueError, RecursionError) as error:
        # Only the kind of mistake: what Python says of it may quote the file.
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{where} holds no data key; `holdfast keys make-data` makes one, and its form is in docs/formats.md",
        ) from (error if isinstance(error, RecursionError) else None)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _epoch(name: str) -> int:
    if not (name.isascii() and name.isdigit()) or name.startswith("0"):
        raise ValueError("an epoch is a decimal number")
    return int(name)


def _secret(text: object) -> bytes:
    if not isinstance(text, str) or len(text) != 2 * KEY_BYTES:
        raise ValueError("a secret is 64 hexadecimal digits")
    return bytes.fromhex(text)
