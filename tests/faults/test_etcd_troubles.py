"""The metadata store in trouble under load: leader killed, history compacted under watches, files defragmented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import assert_kept
from tests.support.etcd import EtcdCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_leader_of_etcd_killed_under_load(cluster: FaultCluster, tmp_path: Path) -> None:
    etcd = cluster.etcd
    with cluster.load(tmp_path, seed=701) as load:
        for _ in range(2):
            load.await_writes(2)
            leader = leader_of(etcd)
            etcd.kill(leader)
            load.await_writes(2)
            etcd.restart(leader)
            etcd.wait_healthy()
        load.await_writes(2)
    with cluster.manager() as manager:
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)


def test_history_compacted_under_watches_that_were_cut_off(cluster: FaultCluster, tmp_path: Path) -> None:
    """A paused coordinator comes back to members that no longer know what it has not seen, and reads anew."""
    etcd, (paused, _) = cluster.etcd, cluster.coordinators
    with cluster.load(tmp_path, seed=702) as load:
        load.await_writes(2)
        paused.pause()
        load.await_writes(3)
        for member in range(etcd.members):
            # So that its watches end, whichever member they hang on.
            etcd.kill(member)
            etcd.restart(member)
            etcd.wait_healthy()
        load.await_writes(1)
        etcd.ctl("compact", str(revision_of(etcd)), "--physical")
        paused.resume()
        load.await_writes(2)
        etcd.ctl("defrag")
        load.await_writes(2)
    with cluster.manager() as manager, cluster.place.manager(paused.address) as by_the_paused:
        converge(manager, nodes=len(cluster.nodes))
        assert by_the_paused.points(load.vm_id) == manager.points(load.vm_id)
        converge(by_the_paused, nodes=len(cluster.nodes))
        assert_kept(by_the_paused, load)


def leader_of(etcd: EtcdCluster) -> int:
    """Return the position of the member that leads."""
    told = json.loads(etcd.ctl("endpoint", "status", "-w", "json"))
    leading = [each["Endpoint"] for each in told if each["Status"]["leader"] == each["Status"]["header"]["member_id"]]
    return etcd.endpoints.index(leading[0].removeprefix("http://"))


def revision_of(etcd: EtcdCluster) -> int:
    """Return the newest revision."""
    statuses = json.loads(etcd.ctl("endpoint", "status", "-w", "json"))
    return max(int(each["Status"]["header"]["revision"]) for each in statuses)
