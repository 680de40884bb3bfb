"""Registrations of VMs: which volumes a VM has and where they are read from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import Stored, load, parse, still
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    LIST_ITEMS_MAX,
    VOLUME_BLOCK_BYTES_DEFAULT,
    VOLUME_BLOCK_BYTES_MAX,
    VOLUME_BLOCK_BYTES_MIN,
    VOLUMES_PER_VM_MAX,
)
from holdfast_core.model.names import check_name, check_volume_name
from holdfast_core.model.uris import check_volume_uri
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1.records_pb2 import CodecChoice, VmRecord, VolumeSpec
from holdfast_proto.v1.tenants_pb2 import Quota


def normalised(vm: VmRecord) -> VmRecord:
    """Return a registration in its one stored form: volumes by name, defaults filled in, no time. Pure.

    Raises:
        HoldfastError: INVALID_ARGUMENT if a name, URI, block size or codec is wrong, a name comes twice, or there is no
            volume; LIMIT_EXCEEDED for too many volumes.
    """
    check_name(vm.vm_id, "VM name")
    if not vm.volumes:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the VM {vm.vm_id} has no volume; name at least one")
    if len(vm.volumes) > VOLUMES_PER_VM_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"the VM {vm.vm_id} has {len(vm.volumes)} volumes; {VOLUMES_PER_VM_MAX} are allowed",
        )
    volumes = sorted(map(_normalised_volume, vm.volumes), key=lambda volume: volume.name)
    for volume, following in itertools.pairwise(volumes):
        if volume.name == following.name:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the volume {volume.name} is named twice")
    return VmRecord(vm_id=vm.vm_id, volumes=volumes)


def check_block_bytes(block_bytes: int, volume: str) -> int:
    """Return the block size if a volume may be cut so.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is not a power of two from 16 KiB to 4 MiB.
    """
    if not VOLUME_BLOCK_BYTES_MIN <= block_bytes <= VOLUME_BLOCK_BYTES_MAX or block_bytes & (block_bytes - 1):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the volume {volume} has blocks of {block_bytes} bytes; a power of two from {VOLUME_BLOCK_BYTES_MIN} to "
            f"{VOLUME_BLOCK_BYTES_MAX} is allowed",
        )
    return block_bytes


def _normalised_volume(volume: VolumeSpec) -> VolumeSpec:
    check_volume_name(volume.name)
    check_volume_uri(volume.uri, live=volume.live)
    if volume.codec not in CodecChoice.values():
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the volume {volume.name} names the unknown codec {volume.codec}"
        )
    return VolumeSpec(
        name=volume.name,
        uri=volume.uri,
        block_bytes=check_block_bytes(volume.block_bytes or VOLUME_BLOCK_BYTES_DEFAULT, volume.name),
        live=volume.live,
        codec=volume.codec,
    )


class Vms:
    """Registrations of one tenant's VMs."""

    def __init__(
        self, store: MetadataStore, space: TenantKeyspace, ledger: Ledger, clock: Clock, *, quota: Quota
    ) -> None:
        """Bind to the store; new VMs count against `quota`."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._clock = clock
        self._quota = quota

    async def register(self, vm: VmRecord, *, replace: bool, entry: Entry) -> VmRecord:
        """Register a VM and return the record; the same registration again changes nothing.

        Raises:
            HoldfastError: as `normalised`; ALREADY_EXISTS if the name has another registration and `replace` is not
                set; QUOTA_EXCEEDED; CONFLICT if another caller registered it meanwhile.
        """
        wanted = normalised(vm)
        key = self._space.vm(wanted.vm_id)
        item = await self._store.get(key)
        present = None if item is None else parse(item, VmRecord).message
        if present is not None:
            if _same(present, wanted):
                entry.repeated()
                return present
            if not replace:
                raise HoldfastError(
                    ErrorCode.ALREADY_EXISTS,
                    f"the VM {wanted.vm_id} is registered with other volumes; replace the registration explicitly",
                )
        wanted.created_unix_ms = self._clock.now_unix_ms() if present is None else present.created_unix_ms
        usage = UsageChange(tenant=self._space.tenant, quota=self._quota, vms=1) if present is None else None
        operations = [Put(key, wanted.SerializeToString())]
        if await self._ledger.apply(entry, [still(key, item)], operations, usage) is Outcome.APPLIED:
            return wanted
        # Somebody registered it in between: identical is as good as ours, anything else is theirs to keep.
        now = await self.get(wanted.vm_id)
        if _same(now.message, wanted):
            entry.repeated()
            return now.message
        raise HoldfastError(
            ErrorCode.CONFLICT, f"the VM {wanted.vm_id} was registered by someone else at the same time"
        )

    async def get(self, vm_id: str) -> Stored[VmRecord]:
        """Return a VM's registration.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed name.
        """
        check_name(vm_id, "VM name")
        found = await load(self._store, self._space.vm(vm_id), VmRecord)
        if found is None:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no VM {vm_id}; register it first")
        return found

    async def find(self, vm_id: str) -> VmRecord | None:
        """Return a VM's registration, None if it is gone."""
        found = await load(self._store, self._space.vm(vm_id), VmRecord)
        return None if found is None else found.message

    async def page(self, *, after: str, limit: int, allowed: Callable[[str], bool]) -> tuple[Sequence[VmRecord], bool]:
        """Return VMs whose names sort above `after`, and whether there may be more; `limit` 0 means the most allowed.

        VMs of which `allowed` says no are left out. It reads on until there is one to return or no more to read, so
        that an answer without a VM is the last one.
        """
        if after:
            check_name(after, "VM name")
        count = min(limit or LIST_ITEMS_MAX, LIST_ITEMS_MAX)
        place, portion = self._space.vm(after) if after else "", count
        while True:
            page = await self._store.page(self._space.vms_prefix, after=place, limit=portion)
            vms = [parse(item, VmRecord).message for item in page.items]
            kept = [vm for vm in vms if allowed(vm.vm_id)]
            if kept or not page.more:
                return kept[:count], page.more or len(kept) > count
            # Small pages are for small answers, not for looking through what the caller may not see.
            place, portion = page.items[-1].key, LIST_ITEMS_MAX


def _same(one: VmRecord, other: VmRecord) -> bool:
    """Whether two registrations are the same but for the time."""
    return list(one.volumes) == list(other.volumes)
