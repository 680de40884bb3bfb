"""The secrets of a tenant, what is derived from them, and how they are wrapped (DESIGN section 5, docs/formats.md).

A tenant has two independent secrets, each a root that lasts for good and one secret an epoch. *Data* seals volume and
application blocks, fingerprints, cuts and authenticates records; *structure* seals index nodes. Whoever has structure
alone can walk, check and collect, and can neither read content nor forge a record.

No key is ever shown: representations name epochs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from blake3 import blake3

from holdfast_core.model.block import Kind, Opener, Sealer
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lent import SealingKeys, fingerprint_of
from holdfast_core.model.xaes import KEY_BYTES, NONCE_BYTES, Buffer, Xaes
from holdfast_proto.v1.common_pb2 import TenantKeys
from holdfast_proto.v1.records_pb2 import WrappedSecret

CONTEXT_DATA_CIPHER: Final = "holdfast v1 data cipher key"
CONTEXT_DATA_NONCE: Final = "holdfast v1 data nonce key"
CONTEXT_STRUCTURE_CIPHER: Final = "holdfast v1 structure cipher key"
CONTEXT_STRUCTURE_NONCE: Final = "holdfast v1 structure nonce key"
CONTEXT_FINGERPRINT: Final = "holdfast v1 fingerprint key"
CONTEXT_CUTTING: Final = "holdfast v1 cutting key"
CONTEXT_RECORD_MAC: Final = "holdfast v1 record mac key"
CONTEXT_MASTER_FINGERPRINT: Final = "holdfast v1 master key fingerprint"

_MASTER_FINGERPRINT_BYTES: Final = 8
_KEY_EPOCH_MAX: Final = 2**32 - 1


def _derive(context: str, secret: bytes) -> bytes:
    return blake3(secret, derive_key_context=context).digest()


@dataclass(frozen=True, slots=True, repr=False)
class TenantSecrets:
    """The secrets of one tenant, as far as the holder may have them.

    Attributes:
        tenant: number of the tenant.
        data_root: 32 bytes, or None where the data secret is withheld.
        data_epochs: 32 bytes by key epoch; empty exactly where the data secret is withheld.
        structure_root: 32 bytes.
        structure_epochs: 32 bytes by key epoch, at least one.
    """

    tenant: int
    data_root: bytes | None
    data_epochs: Mapping[int, bytes]
    structure_root: bytes
    structure_epochs: Mapping[int, bytes]

    def __post_init__(self) -> None:
        """Freeze the mappings and check every length.

        Raises:
            ValueError: a secret that is not 32 bytes, an epoch out of range, half of a data secret, or no structure.
        """
        object.__setattr__(self, "data_epochs", MappingProxyType(dict(sorted(self.data_epochs.items()))))
        object.__setattr__(self, "structure_epochs", MappingProxyType(dict(sorted(self.structure_epochs.items()))))
        secrets = [self.structure_root, *self.data_epochs.values(), *self.structure_epochs.values()]
        if self.data_root is not None:
            secrets.append(self.data_root)
        if any(len(secret) != KEY_BYTES for secret in secrets):
            raise ValueError(f"every secret takes {KEY_BYTES} bytes")
        if any(not 1 <= epoch <= _KEY_EPOCH_MAX for epoch in (*self.data_epochs, *self.structure_epochs)):
            raise ValueError("key epochs begin at 1 and fit 32 bits")
        if (self.data_root is None) != (not self.data_epochs):
            raise ValueError("a data secret has both a root and an epoch, or neither")
        if not self.structure_epochs:
            raise ValueError("the structure secret has no epoch")

    def __repr__(self) -> str:
        return (
            f"TenantSecrets(tenant={self.tenant}, data_epochs={list(self.data_epochs)}, "
            f"structure_epochs={list(self.structure_epochs)})"
        )

    @classmethod
    def from_message(cls, message: TenantKeys) -> TenantSecrets:
        """Read the secrets from their message.

        Raises:
            HoldfastError: CORRUPT if a secret has the wrong length, an epoch comes twice, or one is missing.
        """
        data = {epoch.epoch: epoch.secret for epoch in message.data_epochs}
        structure = {epoch.epoch: epoch.secret for epoch in message.structure_epochs}
        if len(data) != len(message.data_epochs) or len(structure) != len(message.structure_epochs):
            raise HoldfastError(ErrorCode.CORRUPT, "the tenant's keys name an epoch twice")
        try:
            return cls(message.tenant, message.data_root or None, data, message.structure_root, structure)
        except ValueError as error:
            raise HoldfastError(ErrorCode.CORRUPT, f"the tenant's keys are malformed: {error}") from error

    def to_message(self) -> TenantKeys:
        """Return the secrets as a message. Never log it."""
        return TenantKeys(
            tenant=self.tenant,
            data_root=self.data_root or b"",
            data_epochs=[TenantKeys.EpochSecret(epoch=e, secret=s) for e, s in self.data_epochs.items()],
            structure_root=self.structure_root,
            structure_epochs=[TenantKeys.EpochSecret(epoch=e, secret=s) for e, s in self.structure_epochs.items()],
        )

    def without_data(self) -> TenantSecrets:
        """Return the structure secret alone."""
        return TenantSecrets(self.tenant, None, {}, self.structure_root, self.structure_epochs)


def generate_secrets(tenant: int, random_bytes: Callable[[int], bytes]) -> TenantSecrets:
    """Make the secrets of a new tenant, at epoch 1, from a source of random bytes such as `os.urandom`."""
    return TenantSecrets(
        tenant=tenant,
        data_root=random_bytes(KEY_BYTES),
        data_epochs={1: random_bytes(KEY_BYTES)},
        structure_root=random_bytes(KEY_BYTES),
        structure_epochs={1: random_bytes(KEY_BYTES)},
    )


class KeyRing:
    """Everything that is derived from a tenant's secrets. Cheap to make, safe to share between threads.

    Attributes:
        tenant: number of the tenant.
        structure_epoch_newest: newest epoch of the structure secret.
    """

    def __init__(self, secrets: TenantSecrets) -> None:
        self.tenant: Final = secrets.tenant
        self.structure_epoch_newest: Final = max(secrets.structure_epochs)
        self._secrets = secrets
        self._data_ciphers = {e: Xaes(_derive(CONTEXT_DATA_CIPHER, s)) for e, s in secrets.data_epochs.items()}
        self._data_nonce_keys = {e: _derive(CONTEXT_DATA_NONCE, s) for e, s in secrets.data_epochs.items()}
        self._structure_ciphers = {
            e: Xaes(_derive(CONTEXT_STRUCTURE_CIPHER, s)) for e, s in secrets.structure_epochs.items()
        }
        self._structure_nonce_keys = {
            e: _derive(CONTEXT_STRUCTURE_NONCE, s) for e, s in secrets.structure_epochs.items()
        }
        root = secrets.data_root
        self._fingerprint_key = None if root is None else _derive(CONTEXT_FINGERPRINT, root)
        self._cutting_key = None if root is None else _derive(CONTEXT_CUTTING, root)
        self._record_mac_key = None if root is None else _derive(CONTEXT_RECORD_MAC, root)
        self._opener = Opener(data_ciphers=self._data_ciphers, structure_ciphers=self._structure_ciphers)

    def __repr__(self) -> str:
        return f"KeyRing(tenant={self.tenant})"

    @property
    def has_data(self) -> bool:
        """Whether the data secret is here."""
        return self._fingerprint_key is not None

    @property
    def data_epoch_newest(self) -> int:
        """Newest epoch of the data secret.

        Raises:
            HoldfastError: KEY_MISMATCH if the data secret is withheld, as for all that needs it.
        """
        if not self._data_ciphers:
            raise _withheld()
        return max(self._data_ciphers)

    @property
    def cutting_key(self) -> bytes:
        """32 bytes that place the cuts of application data."""
        if self._cutting_key is None:
            raise _withheld()
        return self._cutting_key

    @property
    def record_mac_key(self) -> bytes:
        """32 bytes that authenticate the records of points and objects."""
        if self._record_mac_key is None:
            raise _withheld()
        return self._record_mac_key

    def fingerprint(self, plain: Buffer) -> bytes:
        """Return the 32 bytes that tell whether this plaintext is already known; the same in every key epoch."""
        if self._fingerprint_key is None:
            raise _withheld()
        return fingerprint_of(self._fingerprint_key, plain)

    def check_fingerprint(self, plain: Buffer, fingerprint: bytes, *, block_id: bytes) -> None:
        """Check an opened plaintext against what the index says of it.

        Raises:
            HoldfastError: CORRUPT, naming `block_id`, if it is something else.
        """
        if self.fingerprint(plain) != fingerprint:
            raise HoldfastError(
                ErrorCode.CORRUPT,
                f"block {block_id.hex()} opens to other content than its index names",
                block_ids=[block_id],
            )

    def sealer(self, kind: Kind, epoch: int) -> Sealer:
        """Return a sealer for blocks of `kind` under key `epoch`.

        Raises:
            HoldfastError: KEY_MISMATCH if there is no such epoch here.
        """
        structure = kind is Kind.INDEX
        cipher = (self._structure_ciphers if structure else self._data_ciphers).get(epoch)
        if cipher is None:
            secret = "structure" if structure else "data"
            raise HoldfastError(ErrorCode.KEY_MISMATCH, f"there is no {secret} key of epoch {epoch} here")
        nonce_keys = self._structure_nonce_keys if structure else self._data_nonce_keys
        return Sealer(kind=kind, epoch=epoch, cipher=cipher, nonce_key=nonce_keys[epoch])

    def volume_keys(self, epoch: int) -> SealingKeys:
        """Return what another process needs to fingerprint and seal volume blocks under key `epoch`.

        Raises:
            HoldfastError: KEY_MISMATCH if there is no such epoch here.
        """
        secret = self._secrets.data_epochs.get(epoch)
        if secret is None or self._fingerprint_key is None:
            raise HoldfastError(ErrorCode.KEY_MISMATCH, f"there is no data key of epoch {epoch} here")
        cipher_key = _derive(CONTEXT_DATA_CIPHER, secret)
        return SealingKeys(Kind.VOLUME, epoch, cipher_key, self._data_nonce_keys[epoch], self._fingerprint_key)

    def opener(self) -> Opener:
        """Return an opener for every epoch that is here."""
        return self._opener


def _withheld() -> HoldfastError:
    return HoldfastError(
        ErrorCode.KEY_MISMATCH,
        "the tenant keeps its data secret to itself and it is not here; give its file with --key-file "
        "(HOLDFAST_KEY_FILE)",
    )


def master_fingerprint(master: bytes) -> bytes:
    """Return the 8 bytes by which a master key is recognised; they tell nothing else about it.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the key is not 32 bytes.
    """
    if len(master) != KEY_BYTES:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a master key takes {KEY_BYTES} bytes, not {len(master)}")
    return blake3(master, derive_key_context=CONTEXT_MASTER_FINGERPRINT).digest(_MASTER_FINGERPRINT_BYTES)


def wrap_secret(master: bytes, plain: bytes, purpose: str, nonce: bytes) -> WrappedSecret:
    """Wrap `plain` under the master key for one purpose, with a fresh random nonce of 24 bytes."""
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"the nonce takes {NONCE_BYTES} bytes, not {len(nonce)}")
    return WrappedSecret(
        master_fingerprint=master_fingerprint(master),
        nonce=nonce,
        ciphertext=Xaes(master).encrypt(nonce, plain, purpose.encode()),
    )


def unwrap_secret(master: bytes, wrapped: WrappedSecret, purpose: str) -> bytes:
    """Return what was wrapped for `purpose`.

    Raises:
        HoldfastError: KEY_MISMATCH, with the fingerprints of both, if another master key wrapped it; CORRUPT if it
            was altered or wrapped for another purpose.
    """
    have = master_fingerprint(master)
    if have != wrapped.master_fingerprint:
        raise HoldfastError(
            ErrorCode.KEY_MISMATCH,
            f"the secret is wrapped by the master key {wrapped.master_fingerprint.hex()}, but {have.hex()} was given",
            facts={"wrapped_by": wrapped.master_fingerprint.hex(), "given": have.hex()},
        )
    if len(wrapped.nonce) != NONCE_BYTES:
        raise HoldfastError(ErrorCode.CORRUPT, f"the wrapped secret for {purpose} has a malformed nonce")
    return Xaes(master).decrypt(wrapped.nonce, wrapped.ciphertext, purpose.encode())
