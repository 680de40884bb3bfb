"""Wall clocks that jump by hours under load, in a real process: libfaketime stands between it and the clock."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError
from tests.e2e.harness import eventually
from tests.e2e.services import Service
from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import assert_kept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/local/lib/faketime/libfaketime.so.1")
_HOURS_S = 5 * 3600


class JumpingClock:
    """The wall clock of one service, ahead of or behind everybody's."""

    def __init__(self, cluster: FaultCluster, service: Service, folder: Path, library: Path) -> None:
        """Start the service again under this clock, which is right as yet."""
        self._file = folder / f"clock-of-{service.name}"
        self.jump(0)
        cluster.restart_with(
            service,
            LD_PRELOAD=str(library),
            FAKETIME_TIMESTAMP_FILE=str(self._file),
            FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
        )

    def jump(self, seconds: int) -> None:
        """Show a time so many seconds from the true one."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.replace(self._file)


@pytest.fixture
def library() -> Path:
    found = [path for pattern in _LIBRARIES for path in sorted(Path("/").glob(pattern.removeprefix("/")))]
    assert found, "libfaketime is not here; tools/system-packages names what the tests need"
    return found[0]


@pytest.fixture
def honest_again(cluster: FaultCluster) -> Iterator[None]:
    yield
    for service in (*cluster.coordinators, *cluster.nodes.values()):
        if "LD_PRELOAD" in service.variables:
            cluster.restart_with(service, LD_PRELOAD="", FAKETIME_TIMESTAMP_FILE="")


@pytest.mark.usefixtures("honest_again")
@pytest.mark.parametrize(("role", "seed"), [("node", 801), ("coordinator", 802)])
def test_a_clock_that_jumps_ahead_and_back(
    cluster: FaultCluster, tmp_path: Path, library: Path, role: str, seed: int
) -> None:
    source = random.Random(seed)
    services = list(cluster.nodes.values()) if role == "node" else cluster.coordinators
    service = source.choice(services)
    clock = JumpingClock(cluster, service, tmp_path, library)
    # Nodes refuse what a coordinator with a wrong clock signs, and say so.
    excused = frozenset({ErrorCode.DENIED}) if role == "coordinator" else frozenset[ErrorCode]()
    with cluster.manager() as manager, cluster.load(tmp_path, seed=seed, excused=excused) as load:
        eventually(lambda: all(node.up for node in manager.nodes()), "all are up")
        load.await_writes(2)
        locked = next(iter(load.book.points))
        manager.lock(locked, datetime.timedelta(hours=1))
        for jump_s in (_HOURS_S, -_HOURS_S):
            clock.jump(jump_s)
            if role == "node":
                load.await_writes(3)
                # The node refuses what has not begun or has ended by its clock; that makes it one copy that is missing.
                assert manager.verify_all(node_only=True).thin_blocks
            else:
                assert_refused_plainly(cluster, service, seed)
            write_by_the_others(cluster, service, seed)
            # Leases go by clocks that nobody sets, and a lock does not end because one clock is ahead.
            assert all(node.up for node in manager.nodes())
            for coordinator in cluster.coordinators:
                with cluster.place.manager(coordinator.address) as by_one, pytest.raises(HoldfastError) as refused:
                    by_one.forget(locked)
                assert refused.value.code is ErrorCode.CONFLICT, refused.value
        clock.jump(0)
        load.await_writes(3)
        load.close()
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
    denied = [error.message for error in load.book.refusals if error.code is ErrorCode.DENIED]
    assert all("capability" in message for message in denied), denied


def assert_refused_plainly(cluster: FaultCluster, wrong: Service, seed: int) -> None:
    """Through the coordinator whose clock is wrong nothing can be written, for the reason that there is."""
    with cluster.place.manager(wrong.address) as manager, pytest.raises(HoldfastError) as refused:
        manager.persist_application_data(f"task-{seed}", b"by the wrong clock")
    assert refused.value.code is ErrorCode.DENIED, refused.value
    assert "capability" in refused.value.message


def write_by_the_others(cluster: FaultCluster, wrong: Service, seed: int) -> None:
    """Write and read something by the coordinators whose clocks are right."""
    right = [each.address for each in cluster.coordinators if each is not wrong]
    with cluster.place.manager(",".join(right)) as manager:
        stored = manager.persist_application_data(f"task-{seed}", b"in the meantime")
        assert manager.retrieve_application_data(stored) == b"in the meantime"
