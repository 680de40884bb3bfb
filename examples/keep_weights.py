"""Of a task's disk only the weights are kept: selective persistence, and what it saves.

HOLDFAST_COORDINATOR=127.0.0.1:7400 python examples/keep_weights.py    # or without: a cluster in memory
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from pathlib import Path

from holdfast import PointFiles, StateManager
from holdfast.testing import MemoryCluster

MIB = 1 << 20


def make_disk(work: Path) -> Path:
    """Make the disk of a task that trained a model: an ext4 image, without root."""
    tree = work / "tree"
    parameters = random.Random(1)
    files = {
        "data/train.parquet": parameters.randbytes(64 * MIB),
        "root/.cache/pip/torch.whl": parameters.randbytes(32 * MIB),
        "root/.cache/huggingface/token": b"hf_secret",
        "work/checkpoints/step-1000.safetensors.tmp": parameters.randbytes(3 * MIB),
        "work/train.log": b"".join(b"step %d loss %f\n" % (step, 1 / (step + 1)) for step in range(50_000)),
        "work/out/model.safetensors": parameters.randbytes(2 * MIB),
    }
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    disk = work / "root.raw"
    with disk.open("wb") as image:
        image.truncate(160 * MIB)
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, disk], check=True, env={**os.environ, "PATH": path})
    return disk


def keep_weights(manager: StateManager, disk: Path, work: Path) -> float:
    """Snapshot the disk, keep its weights, forget the rest; returns how much of what it occupied need not be kept."""
    manager.register_vm("trainer", {"root": disk})
    snapshot_id = manager.create_snapshot("trainer")
    storage_id = manager.persist_files(
        "train-7", PointFiles(snapshot_id), include=["**/*.safetensors"], exclude_secrets=True
    )
    occupied = manager.point(snapshot_id).stats.stored_bytes
    kept = manager.application_data(storage_id).stats.stored_bytes

    manager.forget(snapshot_id)  # and the VM is thrown away
    manager.retrieve_files(storage_id, work / "results")
    weights = (work / "results" / "work" / "out" / "model.safetensors").stat().st_size
    print(f"the disk occupied {occupied / 1e6:.1f} MB, the set {kept / 1e6:.1f} MB")
    print(f"{weights / 1e6:.1f} MB of weights are back")
    return 1 - kept / occupied


def main() -> int:
    """Run against the cluster that the environment names, or one in memory; 0 if at least 95 % is saved."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        disk = make_disk(work)
        if os.environ.get("HOLDFAST_COORDINATOR"):
            with StateManager() as manager:
                saved = keep_weights(manager, disk, work)
        else:
            with MemoryCluster(nodes=3) as cluster, cluster.state_manager() as manager:
                saved = keep_weights(manager, disk, work)
    print(f"{saved:.1%} saved")
    return 0 if saved >= 0.95 else 1


if __name__ == "__main__":
    raise SystemExit(main())
