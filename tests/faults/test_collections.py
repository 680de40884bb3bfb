"""Collections again and again beside writers, forgets and dying nodes: only garbage goes, and all of it."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError
from tests.e2e.harness import eventually
from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import assert_kept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Collecting:
    """Collects without a pause while open, as the command `gc --wait` does, and counts what went."""

    def __init__(self, cluster: FaultCluster) -> None:
        self.ended = 0
        self.deleted_copies = 0
        self._cluster = cluster
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Collecting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the last collection ends"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with self._cluster.manager() as manager:
                while not self._ending.is_set():
                    try:
                        report = manager.collect()
                    except HoldfastError as error:
                        if not error.retryable:
                            raise
                        self._ending.wait(0.2)
                        continue
                    assert report.phase == "done", report
                    assert not report.lost_blocks, report
                    self.ended += 1
                    self.deleted_copies += report.deleted_copies
        except (HoldfastError, AssertionError) as error:
            self._failure = error


@pytest.mark.parametrize(("role", "seed"), [("node", 911), ("coordinator", 912)])
def test_collections_beside_load_forgets_and_a_kill(
    cluster: FaultCluster, tmp_path: Path, role: str, seed: int
) -> None:
    source = random.Random(seed)
    services = sorted(cluster.nodes.values() if role == "node" else cluster.coordinators, key=lambda each: each.name)
    with cluster.manager() as manager:
        with cluster.load(tmp_path, seed=seed, forgets=True) as load, Collecting(cluster) as collecting:
            load.await_writes(source.randrange(4, 8))
            victim = source.choice(services)
            victim.kill()
            load.await_writes(4)
            victim.start()
            load.await_writes(6)
            eventually(lambda: collecting.ended >= 3, "several collections", within_s=120)
        assert load.book.forgotten
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)

        def all_garbage_is_gone() -> bool:
            try:
                manager.collect()
                plan = manager.collect(dry_run=True)
            except HoldfastError as error:
                if error.code not in (ErrorCode.BUSY, ErrorCode.UNREACHABLE):
                    raise
                return False
            return not (plan.garbage_copies or plan.young_copies or plan.nodes_left_out or plan.tenants_left_out)

        # Sessions that a fault cut off hold what they sent until they lapse.
        eventually(all_garbage_is_gone, "all garbage is gone", within_s=120)
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
    assert collecting.deleted_copies > 0
