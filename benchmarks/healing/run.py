"""The course of the measurement: a cluster of four nodes is filled, loses one, grows again, and loses it once more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.collection.services import Processes
from benchmarks.healing.clients import Client, Speeds, Turn
from benchmarks.healing.content import fill
from benchmarks.healing.disk import durable_copy_s
from benchmarks.healing.watch import Healed, epoch, wait, wait_healed, whole
from benchmarks.measure import settle
from holdfast.manager import StateManager

NODES: Final = 4
REPLICAS: Final = 3
_LOST: Final = "node-4"
_NEW: Final = "node-5"
# Shorter than any node can read what it holds: a scrub goes on all the time, as fast as it ever may.
_SCRUB_DAYS: Final = 0.00001


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        node_bytes: blocks on the node that is lost.
        volume_bytes: a client's volume.
        turns: backups and restores of each kind of measurement that does not end by itself.
        out_after_s: how long a node is down before it is left out.
    """

    node_bytes: int
    volume_bytes: int
    turns: int
    out_after_s: float = 10.0


def measure(
    folder: Path, sizes: Sizes, say: Callable[[str], None], *, node_options: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure in processes below `folder`; returns the figures."""
    processes = Processes(folder, nodes=NODES, node_options=node_options)
    try:
        processes.start_coordinator()
        processes.start_nodes()
        with StateManager(processes.address, token_file=processes.token_file) as manager:
            wait(lambda: whole(manager), "the first layout is known to all")
        processes.stop(*processes.node_ids)
        nodes = [(node_id, processes.node_folder(node_id)) for node_id in processes.node_ids]
        blocks = fill(nodes, node_bytes=sizes.node_bytes, replicas=REPLICAS)
        say(f"filled with {blocks} blocks, {REPLICAS} copies of each")
        processes.start_nodes()
        with StateManager(processes.address, token_file=processes.token_file) as manager:
            wait(lambda: whole(manager), "all nodes are back")
            return {"blocks": blocks, "out_after_s": sizes.out_after_s, **_Course(processes, manager, sizes, say).run()}
    finally:
        processes.stop()


class _Course:
    def __init__(self, processes: Processes, manager: StateManager, sizes: Sizes, say: Callable[[str], None]) -> None:
        self._processes = processes
        self._manager = manager
        self._sizes = sizes
        self._say = say
        self._client = Client(manager, processes.folder / "client", volume_bytes=sizes.volume_bytes)

    def run(self) -> dict[str, Any]:
        client, sizes = self._client, self._sizes
        self._hasten()
        copies_s = [durable_copy_s(self._processes.folder, sizes.node_bytes)]
        repair = self._loss_of(_LOST)
        copies_s.append(durable_copy_s(self._processes.folder, sizes.node_bytes))
        self._say(
            f"repair: {repair.changed_s:.1f} s from the layout change, {repair.lost_s:.1f} s from the loss, "
            f"{repair.cpu_s:.1f} CPU s, {repair.repaired_bytes / 1e6:.0f} MB; plain copies "
            + ", ".join(f"{copy_s:.1f} s" for copy_s in copies_s)
        )
        growth_s = self._growth()
        self._say(f"growth: {growth_s:.1f} s until the new node has its share, and the others have let go of it")
        client.turn()
        undisturbed = self._turns()
        scrubbed = client.speeds(self._during_a_scrub())
        self._say_speeds("during a scrub", scrubbed)
        undisturbed += self._turns()
        before = client.speeds(undisturbed)
        self._say_speeds("undisturbed", before)
        beside, repaired = self._during_a_repair()
        beside_speeds = client.speeds(beside)
        self._say_speeds("during a repair", beside_speeds)
        self._say(f"repair beside clients: {repaired.changed_s:.1f} s from the layout change")
        return {
            "node_bytes": sizes.node_bytes,
            "volume_bytes": sizes.volume_bytes,
            "copies_s": copies_s,
            "repair": asdict(repair),
            "repair_beside_clients": asdict(repaired),
            "growth_s": growth_s,
            "clients": {
                "undisturbed": asdict(before),
                "scrub": asdict(scrubbed),
                "repair": asdict(beside_speeds),
            },
            "turns": {
                "undisturbed": [asdict(turn) for turn in undisturbed],
                "repair": [asdict(turn) for turn in beside],
            },
        }

    def _turns(self) -> list[Turn]:
        self._client.prepare(self._sizes.turns)
        settle()
        return [self._client.turn() for _ in range(self._sizes.turns)]

    def _during_a_scrub(self) -> list[Turn]:
        self._restart("--scrub-days", str(_SCRUB_DAYS))
        turns = self._turns()
        self._restart()
        return turns

    def _hasten(self) -> None:
        """Let nodes be given up soon from now on; before, none was to be because it was slow to start."""
        self._processes.stop("coordinator")
        self._processes.coordinator_options = ("--out-after", str(self._sizes.out_after_s))
        self._processes.start_coordinator()
        self._wait_back()

    def _wait_back(self) -> None:
        def back() -> bool:
            return all(node.up or node.out for node in self._manager.cluster_status().nodes) and whole(self._manager)

        wait(back, "all nodes are back")

    def _restart(self, *options: str) -> None:
        for node_id in sorted(set(self._processes.running) - {"coordinator"}):
            self._processes.stop(node_id)
            self._processes.start_node(node_id, *options)
        self._wait_back()

    def _loss_of(self, node_id: str) -> Healed:
        settle()
        before = epoch(self._manager)
        lost_at_s = time.monotonic()
        self._processes.lose(node_id)
        return wait_healed(self._manager, self._processes, lost_at_s=lost_at_s, epoch_before=before)

    def _growth(self) -> float:
        self._processes.start_node(_NEW)
        before = epoch(self._manager)
        wait(
            lambda: any(node.node_id == _NEW for node in self._manager.cluster_status().nodes), "the new node is known"
        )
        start_s = time.monotonic()
        self._manager.apply_layout(remove=(_LOST,), previous_epoch=before)

        def settled() -> bool:
            nodes = self._manager.cluster_status().nodes
            return whole(self._manager, epoch_min=before + 1) and not any(node.healing.foreign_blocks for node in nodes)

        wait(settled, "the new node has its share", within_s=1800.0)
        return time.monotonic() - start_s

    def _during_a_repair(self) -> tuple[list[Turn], Healed]:
        self._client.prepare(self._sizes.turns * 2)
        settle()
        before = epoch(self._manager)
        healed: list[Healed] = []

        def watch() -> None:
            lost_at_s = time.monotonic()
            self._processes.lose(_NEW)
            with StateManager(self._processes.address, token_file=self._processes.token_file) as manager:
                healed.append(wait_healed(manager, self._processes, lost_at_s=lost_at_s, epoch_before=before))

        watching = threading.Thread(target=watch)
        watching.start()
        turns: list[Turn] = []
        wait(lambda: epoch(self._manager) > before, "a layout without the node")
        while watching.is_alive():
            turns.append(self._client.turn(watching.is_alive))
        watching.join()
        return turns, healed[0]

    def _say_speeds(self, what: str, speeds: Speeds) -> None:
        self._say(f"{what}: backup {speeds.backup_mb_s:.0f} MB/s, restore {speeds.restore_mb_s:.0f} MB/s")
