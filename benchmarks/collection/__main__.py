"""Measures a whole collection: blocks in a real cluster of processes with three copies each, half of them garbage.

python -m benchmarks.collection [--blocks 1000000] [--points 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.collection.content import Stores, VolumeBlocks, sealed_portions
from benchmarks.collection.services import Processes
from benchmarks.machine import this_machine
from holdfast.collection import CollectionReport
from holdfast.manager import StateManager
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.layout import Layout
from holdfast_core.model.records import point_mac
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.credentials import Credential
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import CONSISTENCY_OFFLINE, VolumeRecord
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

RESULTS: Final = Path(__file__).parents[1] / "results" / "collection.json"
GOAL_S: Final = 120.0
_BLOCK_BYTES: Final = 64 * 1024
_READY_S: Final = 120.0
_COMMIT_S: Final = 600.0


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collection")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="distinct blocks, half of them garbage")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-collection-") as folder:
        figures = measure(Path(folder), given.blocks)
    given.out.write_text(json.dumps({"machine": asdict(this_machine()), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"goal: within {GOAL_S:.0f} s: {'met' if figures['collection_s'] <= GOAL_S else 'missed'}")


def measure(folder: Path, blocks: int) -> dict[str, Any]:
    """Fill a cluster, collect it, and return the figures."""
    processes = Processes(folder)
    started_s = time.monotonic()
    try:
        processes.start_coordinator()
        processes.start_nodes()
        with StateManager(processes.address, token_file=processes.token_file) as manager:
            _wait(lambda: manager.cluster_status().writable, "the cluster takes writes")
            manager.register_vm("bench", {"disk": "/dev/null"})
            point_id = asyncio.run(_fill(processes, blocks))
            setup_s = time.monotonic() - started_s
            processes.forget_peaks()
            before = {name: (processes.rss_bytes(name), processes.cpu_s(name)) for name in processes.running}
            began_s = time.monotonic()
            report = manager.collect()
            collection_s = time.monotonic() - began_s
            _check(report, blocks, processes.log("coordinator"))
            # The blocks are shorter than a volume's really are, so nodes alone can say that they are whole.
            verified = manager.verify(point_id, node_only=True)
            if verified.thin_blocks:
                raise RuntimeError(f"the point that was kept is not whole: {verified}")
        return {
            "blocks": blocks,
            "copies": report.listed_copies,
            "setup_s": round(setup_s, 1),
            "collection_s": round(collection_s, 1),
            "processes": {
                name: {
                    "rss_before_mb": round(rss / 1e6),
                    "peak_rss_mb": round(processes.peak_rss_bytes(name) / 1e6),
                    "cpu_s": round(processes.cpu_s(name) - cpu_s, 1),
                }
                for name, (rss, cpu_s) in before.items()
            },
            "report": asdict(report),
        }
    finally:
        processes.stop()


async def _fill(processes: Processes, blocks: int) -> str:
    """Make a point of half of the blocks and leave the other half to nobody; return the point's id."""
    kept = blocks // 2
    metadata = Credential(token_file=processes.token_file).metadata()
    async with open_channel(processes.address) as channel:
        state = StateServiceStub(channel)
        begun = await state.BeginPoint(
            state_pb2.BeginPointRequest(vm_id="bench", nonce=os.urandom(16)), metadata=metadata
        )
        keeping = asyncio.create_task(_keep_alive(state, begun.session_id, metadata))
        try:
            volume = await asyncio.to_thread(_store, processes, begun, kept, blocks - kept)
            ring = KeyRing(TenantSecrets.from_message(begun.grant.keys))
            mac = point_mac(
                ring,
                tenant=ring.tenant,
                point_id=begun.session_id,
                vm_id="bench",
                parent_id="",
                volumes=[volume],
            )
            await state.CommitPoint(
                state_pb2.CommitPointRequest(session_id=begun.session_id, volumes=[volume], mac=mac),
                metadata=metadata,
                timeout=_COMMIT_S,
            )
        finally:
            keeping.cancel()
        return str(begun.session_id)


async def _keep_alive(state: Any, session_id: str, metadata: Any) -> None:
    while True:
        await state.KeepAlive(state_pb2.KeepAliveRequest(session_id=session_id), metadata=metadata)
        await asyncio.sleep(5)


def _store(processes: Processes, begun: state_pb2.BeginPointResponse, kept: int, garbage: int) -> VolumeRecord:
    """Stop the nodes, write into their stores, and start them again; return the volume."""
    grant = begun.grant
    processes.stop(*processes.node_ids)
    stores = Stores(
        [(node_id, processes.node_folder(node_id)) for node_id in processes.node_ids],
        Layout.from_message(grant.layouts[0]),
    )
    count = len(os.sched_getaffinity(0))
    volume = VolumeBlocks(grant, kept)
    for portion in sealed_portions(grant, kept, first=0, processes=count):
        volume.add(portion)
        stores.put_portion(grant.keys.tenant, portion)
    root = volume.finish()
    stores.put(grant.keys.tenant, volume.index)
    for portion in sealed_portions(grant, garbage, first=kept, processes=count):
        stores.put_portion(grant.keys.tenant, portion)
    stores.close()
    processes.start_nodes()
    return VolumeRecord(
        name="disk",
        size_bytes=kept * _BLOCK_BYTES,
        block_bytes=_BLOCK_BYTES,
        root=root,
        consistency=CONSISTENCY_OFFLINE,
        block_count=kept,
    )


def _check(report: CollectionReport, blocks: int, log: str) -> None:
    """Check that exactly the garbage went."""
    garbage = 3 * (blocks - blocks // 2)
    if report.phase != "done" or report.deleted_copies != garbage or report.lost_blocks or report.thin_blocks:
        raise RuntimeError(f"the collection did something else than was expected: {report}\n{log}")


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _READY_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not within {_READY_S:.0f} s: {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
