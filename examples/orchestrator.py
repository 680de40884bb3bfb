"""An orchestrator's loop: VMs of one template work through tasks, and only what the tasks made outlives them.

holdfast up &                                     # or leave it out: a cluster in memory is used then
HOLDFAST_COORDINATOR=127.0.0.1:7400 python examples/orchestrator.py
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from holdfast import StateManager
from holdfast.testing import MemoryCluster

TASKS = 4
STEPS = 3


def make_template(manager: StateManager, work: Path) -> tuple[Path, str]:
    """Make the disk that all VMs start from, and save it once."""
    disk = work / "template.raw"
    with disk.open("wb") as image:
        image.truncate(64 << 20)
        image.write(random.Random(0).randbytes(8 << 20))
    manager.register_vm("template", {"root": disk})
    return disk, manager.create_snapshot("template")


def run_task(manager: StateManager, number: int, template: tuple[Path, str], work: Path) -> str:
    """Run one task in a VM of its own; returns the id of what it made. The VM is gone afterwards."""
    vm_id, disk = f"vm-{number}", work / f"vm-{number}.raw"
    shutil.copyfile(template[0], disk)
    manager.register_vm(vm_id, {"root": disk}, labels={"task": str(number)}, template=template[1])
    snapshot_id = manager.create_snapshot(vm_id)  # names the template's blocks, sends none

    for step in range(STEPS):
        with disk.open("r+b") as running_vm:  # the VM works and writes to its disk
            running_vm.seek((16 + step) << 20)
            running_vm.write(f"step {step} of task {number}\n".encode() * 2000)
        backup_id = manager.incremental_backup(vm_id, snapshot_id)
        if step == 1 and number == 0:
            disk.unlink()  # the host died: go on from the last backup on another one
            where = manager.restore_vm(snapshot_id, backup_id, target=work / "another-host")
            shutil.move(where / "root.raw", disk)

    storage_id = manager.persist_application_data(f"task-{number}", f'{{"task": {number}, "loss": 0.03}}'.encode())
    receipt = manager.discard_vm(vm_id)
    disk.unlink()
    print(f"task {number}: {receipt.point_count} points discarded, {storage_id} kept")
    return storage_id


def run(manager: StateManager, work: Path) -> bool:
    """Run every task; returns whether all results are there, and no VM but the template."""
    template = make_template(manager, work)
    kept = [run_task(manager, number, template, work) for number in range(TASKS)]
    results = [manager.retrieve_application_data(storage_id) for storage_id in kept]
    left = {vm.vm_id for vm in manager.list_vms()} & {f"vm-{number}" for number in range(TASKS)}
    print(f"VMs left: {len(left)}; results: {b' '.join(results).decode()}")
    return not left and all(f'"task": {number}'.encode() in result for number, result in enumerate(results))


def main() -> int:
    """Run against the cluster that the environment names, or one in memory; 0 if everything came out right."""
    with tempfile.TemporaryDirectory() as name:
        if os.environ.get("HOLDFAST_COORDINATOR"):
            with StateManager() as manager:
                right = run(manager, Path(name))
        else:
            with MemoryCluster(nodes=3) as cluster, cluster.state_manager() as manager:
                right = run(manager, Path(name))
    print("all kept" if right else "SOMETHING IS WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
