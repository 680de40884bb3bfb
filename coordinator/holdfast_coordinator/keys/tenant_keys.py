"""New epochs of a tenant's secrets: new blocks are sealed with the newest, old ones stay readable, roots stay for good.

The data secret alone rotates by default: index nodes of what has not changed then keep their ids, so that a rotation
makes no later backup larger (ADR 0086).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keys.chain import KeyChain, tenant_purpose
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.records import Stored, parse
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.xaes import KEY_BYTES
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1.records_pb2 import WrappedSecret
from holdfast_proto.v1.tenants_pb2 import TenantRecord

# Every grant carries all epochs.
EPOCHS_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to rotate, and the newest epochs that the caller has seen; 0 rotates whatever is there."""

    data: bool
    structure: bool
    after_data_epoch: int = 0
    after_structure_epoch: int = 0


class TenantKeyRotation:
    """Starts new epochs."""

    def __init__(
        self,
        store: MetadataStore,
        chain: KeyChain,
        master: MasterKeys,
        ledger: Ledger,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._chain = chain
        self._master = master
        self._ledger = ledger
        self._random_bytes = random_bytes

    async def rotate(self, entry: Entry, tenant: int, wanted: Wanted) -> TenantSecrets:
        """Start new epochs and return all of the tenant's secrets; what is newer than the caller saw stays as it is.

        Raises:
            HoldfastError: INVALID_ARGUMENT for nothing, or for a data secret that the tenant keeps itself;
                LIMIT_EXCEEDED for too many epochs; UNREACHABLE; CONFLICT under contention.
        """
        if not (wanted.data or wanted.structure):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "nothing to rotate: ask for the data or structure secret")
        for _ in range(ATTEMPTS_MAX):
            keys, record = await self._read(tenant)
            if wanted.data and record.message.own_data_key:
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"the tenant {record.message.name} keeps its data key itself; give its file with --key-file",
                )
            secrets = await self._chain.opened(tenant, keys.message)
            rotated = self._rotated(secrets, wanted)
            if rotated == secrets:
                entry.repeated()
                return secrets
            entry.details.update(_epochs(rotated, wanted))
            wrapped = await self._master.wrap(rotated.to_message().SerializeToString(), tenant_purpose(tenant))
            record.message.keys_version += 1
            puts = [
                Put(keys.key, wrapped.SerializeToString()),
                Put(record.key, record.message.SerializeToString()),
            ]
            if await self._ledger.apply(entry, [keys.unchanged, record.unchanged], puts) is Outcome.APPLIED:
                return rotated
        raise contention(f"the rotation of the keys of tenant {tenant}")

    async def _read(self, tenant: int) -> tuple[Stored[WrappedSecret], Stored[TenantRecord]]:
        names = [keyspace.TenantKeyspace(tenant).keys, keyspace.tenant_record(tenant)]
        items = {item.key: item for item in (await self._store.snapshot(names)).items}
        if any(name not in items for name in names):
            raise HoldfastError(ErrorCode.INTERNAL, f"the metadata store holds no keys of tenant {tenant}")
        return parse(items[names[0]], WrappedSecret), parse(items[names[1]], TenantRecord)

    def _rotated(self, secrets: TenantSecrets, wanted: Wanted) -> TenantSecrets:
        data, structure = secrets.data_epochs, secrets.structure_epochs
        if wanted.data:
            data = self._with_newer(data, wanted.after_data_epoch)
        if wanted.structure:
            structure = self._with_newer(structure, wanted.after_structure_epoch)
        return replace(secrets, data_epochs=data, structure_epochs=structure)

    def _with_newer(self, epochs: Mapping[int, bytes], after: int) -> Mapping[int, bytes]:
        newest = max(epochs)
        if after and newest > after:
            return epochs
        if len(epochs) >= EPOCHS_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"the secret has {EPOCHS_MAX} epochs already, and may not more"
            )
        return {**epochs, newest + 1: self._random_bytes(KEY_BYTES)}


def _epochs(rotated: TenantSecrets, wanted: Wanted) -> dict[str, str]:
    said = {}
    if wanted.data:
        said["data_epoch"] = str(max(rotated.data_epochs))
    if wanted.structure:
        said["structure_epoch"] = str(max(rotated.structure_epochs))
    return said
