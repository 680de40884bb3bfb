"""Registrations of VMs: their volumes and where those are read from, and what a VM carries beside them.

A definition has a key of its own, so that lists of VMs stay small whatever their definitions are.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import ANSWER_BYTES_MAX, Stored, load, parse, still
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lifecycle import check_definition, checked_keep, checked_labels
from holdfast_core.model.limits import (
    LIST_ITEMS_MAX,
    VOLUME_BLOCK_BYTES_DEFAULT,
    VOLUME_BLOCK_BYTES_MAX,
    VOLUME_BLOCK_BYTES_MIN,
    VOLUMES_PER_VM_MAX,
)
from holdfast_core.model.names import check_id, check_name, check_volume_name
from holdfast_core.model.uris import check_volume_uri
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Delete, MetadataStore, Operation, Put
from holdfast_proto.v1.records_pb2 import CodecChoice, VmRecord, VolumeSpec
from holdfast_proto.v1.tenants_pb2 import Quota


def normalised(vm: VmRecord) -> VmRecord:
    """Return a registration in its one form: volumes, labels and rules by name, defaults filled in, no time. Pure.

    Raises:
        HoldfastError: INVALID_ARGUMENT if a name, URI, block size or codec is wrong, a name comes twice, or there is no
            volume; LIMIT_EXCEEDED for too many volumes; both as `model.lifecycle` for the rest.
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
    check_definition(vm.definition, vm.definition_name)
    if vm.template_id:
        check_id(vm.template_id, "template's id")
    return VmRecord(
        vm_id=vm.vm_id,
        volumes=volumes,
        labels=checked_labels(vm.labels),
        definition=vm.definition,
        definition_name=vm.definition_name,
        template_id=vm.template_id,
        keep=checked_keep(vm.keep, [volume.name for volume in volumes]),
    )


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
        no_delta=volume.no_delta,
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

    async def register(
        self, vm: VmRecord, *, replace: bool, check_template: Callable[[str], Awaitable[None]], entry: Entry
    ) -> VmRecord:
        """Register a VM and return the record; the same registration again changes nothing.

        `check_template` is asked about the point that a new registration takes as its template, and raises if it may
        not be taken.

        Raises:
            HoldfastError: as `normalised` and `check_template`; ALREADY_EXISTS if the name has another registration and
                `replace` is not set; QUOTA_EXCEEDED; CONFLICT if another caller registered it meanwhile, or if it is
                being discarded.
        """
        wanted = normalised(vm)
        # Which points are kept is a right of its own, so it is neither given nor taken away by registering.
        item = await self._store.get(self._space.vm(wanted.vm_id))
        present = None if item is None else await self._whole(parse(item, VmRecord))
        if vm.HasField("retention") and (present is None or present.message.retention != vm.retention):
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"which points of {wanted.vm_id} are kept is set by a call of its own"
            )
        if present is not None:
            check_lives(present.message)
            if present.message.HasField("retention"):
                wanted.retention.CopyFrom(present.message.retention)
            if _same(present.message, wanted):
                entry.repeated()
                return present.message
            if not replace:
                raise HoldfastError(
                    ErrorCode.ALREADY_EXISTS,
                    f"the VM {wanted.vm_id} is registered otherwise; replace the registration explicitly",
                )
        if wanted.template_id and (present is None or present.message.template_id != wanted.template_id):
            await check_template(wanted.template_id)
        wanted.created_unix_ms = self._clock.now_unix_ms() if present is None else present.message.created_unix_ms
        usage = UsageChange(tenant=self._space.tenant, quota=self._quota, vms=1) if present is None else None
        unchanged = still(self._space.vm(wanted.vm_id), item)
        operations = self._writing(wanted, None if present is None else present.message)
        if await self._ledger.apply(entry, [unchanged], operations, usage) is Outcome.APPLIED:
            return wanted
        # Somebody registered it in between: identical is as good as ours, anything else is theirs to keep.
        now = await self.get_whole(wanted.vm_id)
        if _same(now, wanted):
            entry.repeated()
            return now
        raise HoldfastError(
            ErrorCode.CONFLICT, f"the VM {wanted.vm_id} was registered by someone else at the same time"
        )

    def _writing(self, vm: VmRecord, present: VmRecord | None) -> list[Operation]:
        """Return the operations that write a registration over the present one."""
        definition_key = self._space.vm_definition(vm.vm_id)
        operations: list[Operation] = [Put(self._space.vm(vm.vm_id), without_definition(vm).SerializeToString())]
        if vm.definition:
            operations.append(Put(definition_key, vm.definition))
        elif present is not None and present.definition_name:
            operations.append(Delete(definition_key))
        if present is None:
            # The receipt of an earlier VM of this name, which would be taken for this one's.
            operations.append(Delete(self._space.discard(vm.vm_id)))
        return operations

    async def _whole(self, stored: Stored[VmRecord]) -> Stored[VmRecord]:
        """Return the registration with its definition, newer if it was replaced meanwhile."""
        while stored.message.definition_name:
            item = await self._store.get(self._space.vm_definition(stored.message.vm_id))
            again = await self.get(stored.message.vm_id)
            if again.mod_revision == stored.mod_revision:
                stored.message.definition = item.value if item else b""
                break
            stored = again
        return stored

    async def get_whole(self, vm_id: str) -> VmRecord:
        """Return a VM's registration with its definition. Raises as `get`."""
        return (await self._whole(await self.get(vm_id))).message

    async def get(self, vm_id: str) -> Stored[VmRecord]:
        """Return a VM's registration without its definition.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed name.
        """
        check_name(vm_id, "VM name")
        found = await load(self._store, self._space.vm(vm_id), VmRecord)
        if found is None:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no VM {vm_id}; register it first")
        return found

    async def find(self, vm_id: str) -> VmRecord | None:
        """Return a VM's registration without its definition, None if it is gone."""
        found = await load(self._store, self._space.vm(vm_id), VmRecord)
        return None if found is None else found.message

    async def page(self, *, after: str, limit: int, allowed: Callable[[str], bool]) -> tuple[Sequence[VmRecord], bool]:
        """Return VMs whose names sort above `after`, and whether there may be more; `limit` 0 means the most allowed.

        VMs of which `allowed` says no are left out. It reads on until there is one to return or no more to read, so
        that an answer without a VM is the last one. Definitions are left out.
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
                told = _fitting(kept[:count])
                return told, page.more or len(kept) > len(told)
            # Small pages are for small answers, not for looking through what the caller may not see.
            place, portion = page.items[-1].key, LIST_ITEMS_MAX


def check_lives(vm: VmRecord) -> None:
    """Check that a VM is not being discarded. Raises CONFLICT."""
    if vm.discarding_unix_ms:
        raise HoldfastError(
            ErrorCode.CONFLICT,
            f"the VM {vm.vm_id} is being discarded; discard it once more, which goes on where that stopped",
        )


def without_definition(vm: VmRecord) -> VmRecord:
    """Return a copy of a registration as its key holds it. Pure."""
    bare = VmRecord()
    bare.CopyFrom(vm)
    bare.ClearField("definition")
    return bare


def _fitting(vms: Sequence[VmRecord]) -> Sequence[VmRecord]:
    """Return as many of the VMs, from the first on and at least one, as one answer holds."""
    total = 0
    for at, vm in enumerate(vms):
        total += vm.ByteSize()
        if at and total > ANSWER_BYTES_MAX:
            return vms[:at]
    return vms


def _same(one: VmRecord, other: VmRecord) -> bool:
    """Whether two registrations are the same but for the times and for which points are kept."""
    copies = []
    for vm in (one, other):
        copies.append(VmRecord())
        copies[-1].CopyFrom(vm)
        copies[-1].ClearField("created_unix_ms")
        copies[-1].ClearField("discarding_unix_ms")
        copies[-1].ClearField("retention")
    return copies[0] == copies[1]
