"""The five calls, as an orchestrator makes them around one task's VM.

holdfast up &                                     # or leave it out: a cluster in memory is used then
HOLDFAST_COORDINATOR=127.0.0.1:7400 python examples/five_calls.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from holdfast import StateManager
from holdfast.testing import MemoryCluster


def run_task(manager: StateManager, disk: Path, work: Path) -> bool:
    """Save a VM, let it change, keep what its task made, throw it away, and rebuild it elsewhere.

    Returns whether the rebuilt disk holds the same bytes.
    """
    manager.register_vm("vm-7", {"root": disk})
    snapshot_id = manager.create_snapshot("vm-7")

    with disk.open("r+b") as running_vm:  # the VM works and writes to its disk
        running_vm.seek(4 << 20)
        running_vm.write(b"what the task found out\n" * 1000)
    backup_id = manager.incremental_backup("vm-7", snapshot_id)
    storage_id = manager.persist_application_data("task-42", b'{"loss": 0.03}')

    expected = disk.read_bytes()
    disk.unlink()  # the VM is thrown away

    where = manager.restore_vm(snapshot_id, backup_id, target=work / "another-host")
    print(f"{backup_id} is back in {where}; {storage_id} holds {manager.retrieve_application_data(storage_id)!r}")
    return (where / "root.raw").read_bytes() == expected


def main() -> int:
    """Run against the cluster that the environment names, or one in memory; 0 if the bytes are the same."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        disk = work / "root.raw"
        with disk.open("wb") as image:
            image.truncate(64 << 20)
            image.write(b"a small operating system\n" * 100_000)
        if os.environ.get("HOLDFAST_COORDINATOR"):
            with StateManager() as manager:
                same = run_task(manager, disk, work)
        else:
            with MemoryCluster(nodes=3) as cluster, cluster.state_manager() as manager:
                same = run_task(manager, disk, work)
    print("identical" if same else "DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
