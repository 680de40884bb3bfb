"""The life of a VM beside its points: registering it with all that it carries, and ending it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from holdfast.calls.core import BlockingCore
from holdfast.calls.files import AsyncFileCalls
from holdfast.convert import Volumes, vm_record
from holdfast.index import DAMAGE
from holdfast.results import ObjectForm, ObjectInfo, ProgressCallback, VmInfo
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lifecycle import keep_digest
from holdfast_proto.v1.records_pb2 import KeepRule as KeepRuleMessage

if TYPE_CHECKING:
    from holdfast.lifecycle import DiscardReceipt, KeepRule


class AsyncLifecycleCalls(AsyncFileCalls):
    """Calls about VMs as such."""

    async def register_vm(
        self,
        vm_id: str,
        volumes: Volumes,
        *,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        definition: tuple[bytes, str] | None = None,
        template: str = "",
        keep: Sequence[KeepRule] = (),
    ) -> VmInfo:
        """Register a VM; the same registration again is no error.

        Args:
            vm_id: the VM's name.
            volumes: source by volume name: a path, a URI, or a `VolumeSpec`.
            replace: replace a registration that differs, as a whole: what is left out is gone.
            labels: values by name, kept with the VM and with every point of it.
            definition: what its orchestrator defines it with, at most 64 KiB, and the name of the file that a restore
                writes it to.
            template: a point of any VM; snapshots that name no base take fingerprints from it while it lives.
            keep: what must be stored before the VM may be discarded.

        Raises:
            HoldfastError: ALREADY_EXISTS if it is registered otherwise; INVALID_ARGUMENT for names, URIs, sizes;
                LIMIT_EXCEEDED; NOT_FOUND if there is no such template; CONFLICT while the VM is being discarded.
        """
        record = vm_record(vm_id, volumes, labels=labels, definition=definition, template=template, keep=keep)
        return await self._remote.register_vm(record, replace=replace)

    async def vm(self, vm_id: str) -> VmInfo:
        """Return a VM; NOT_FOUND if it is not registered."""
        return await self._remote.vm(vm_id)

    async def list_vms(self) -> list[VmInfo]:
        """Return all VMs by name, without their definitions."""
        return await self._remote.list_vms()

    async def discard_vm(self, vm_id: str, *, progress: ProgressCallback | None = None) -> DiscardReceipt:
        """End a VM's life: store what its keep rules name, check that it is durable, then discard all its points.

        The files come from the newest living point. Each stored set of them is read back before anything goes. Called
        again after a failure, wherever that struck, it goes on; for a VM that is gone it returns the receipt of then,
        for a day.

        Raises:
            HoldfastError: NOT_FOUND if there is no such VM and none was discarded lately; BUSY while a session holds
                it; CONFLICT, with a list, if something that must be kept cannot be shown to be stored and durable, or
                if there is another newest point by now; and as `persist_files`. The VM is as it was, or is marked as
                being discarded.
        """
        try:
            vm = await self._remote.vm(vm_id)
        except HoldfastError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            # Gone: the coordinator has its receipt, or says that there is none.
            return await self._remote.discard_vm(vm_id, [], newest_point_id="")
        points = await self._remote.points(vm_id, include_forgotten=False)
        newest = points[-1].point_id if points else ""
        from holdfast.lifecycle import keep_message  # most processes discard nothing

        storage_ids = [
            await self._kept(vm_id, newest, keep_message(rule), progress) for rule in (vm.keep if newest else ())
        ]
        return await self._remote.discard_vm(vm_id, storage_ids, newest_point_id=newest)

    async def _kept(self, vm_id: str, point_id: str, rule: KeepRuleMessage, progress: ProgressCallback | None) -> str:
        """Return the id of a set of files that fulfils a rule and that was read back; stores one if there is none."""
        stored = await self._remote.list_objects(rule.task_id)
        for storage_id in reversed([each.storage_id for each in stored if _fulfils(each, vm_id, point_id, rule)]):
            try:
                await self._verify_files(storage_id)
            except HoldfastError as error:
                if error.code not in DAMAGE:
                    raise
                continue  # an earlier attempt's, and damaged since: its files are still in the point
            return storage_id
        try:
            storage_id = await self._persist_rule(vm_id, point_id, rule, progress=progress)
        except HoldfastError as error:
            message = f"the keep rule {rule.name} of {vm_id} cannot be fulfilled: {error.message}"
            raise HoldfastError(error.code, message, facts=error.facts, block_ids=error.block_ids) from error
        await self._verify_files(storage_id)
        return storage_id


def _fulfils(stored: ObjectInfo, vm_id: str, point_id: str, rule: KeepRuleMessage) -> bool:
    """Whether an object says that it holds what a rule names, as of a point."""
    origin = stored.origin
    if stored.form is not ObjectForm.FILES or origin is None:
        return False
    says = (origin.vm_id, origin.point_id, origin.keep_rule, origin.keep_digest)
    return says == (vm_id, point_id, rule.name, keep_digest(rule))


class LifecycleCalls(BlockingCore):
    """The blocking face of `AsyncLifecycleCalls`."""

    def register_vm(
        self,
        vm_id: str,
        volumes: Volumes,
        *,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        definition: tuple[bytes, str] | None = None,
        template: str = "",
        keep: Sequence[KeepRule] = (),
    ) -> VmInfo:
        """Register a VM; the same registration again is no error."""
        return self._loop.run(
            self._core.register_vm(
                vm_id,
                volumes,
                replace=replace,
                labels=labels,
                definition=definition,
                template=template,
                keep=keep,
            )
        )

    def vm(self, vm_id: str) -> VmInfo:
        """Return a VM."""
        return self._loop.run(self._core.vm(vm_id))

    def list_vms(self) -> list[VmInfo]:
        """Return all VMs by name, without their definitions."""
        return self._loop.run(self._core.list_vms())

    def discard_vm(self, vm_id: str, *, progress: ProgressCallback | None = None) -> DiscardReceipt:
        """Store what a VM must keep, check that it is durable, discard the VM's points; returns a receipt."""
        return self._loop.run(self._core.discard_vm(vm_id, progress=progress))
