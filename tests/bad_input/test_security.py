"""Credentials that are no good, as a program meets them, and clocks that disagree."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast import ErrorCode, StateManager
from holdfast.testing import MemoryCluster
from holdfast_core.model.limits import CLOCK_TOLERANCE_S
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import new_token
from holdfast_proto.v1 import access_pb2
from tests.bad_input.rig import Rig, error_of, make_vm
from tests.coordinator.rig import Client


async def revoked_token(rig: Rig) -> str:
    """A token that was good until now."""
    admin = Client(rig.cluster.coordinator_address, token=rig.cluster.token)
    token = await admin.new_token("agent")
    await admin.access("RevokeToken", access_pb2.RevokeTokenRequest(token_id=token.split("_")[1]))
    await admin.close()
    return token


@pytest.mark.parametrize("kind", ["absent", "unknown", "revoked", "half of one"])
def test_a_token_that_is_no_good(rig: Rig, kind: str) -> None:
    tokens: dict[str, Callable[[], str | None]] = {
        "absent": lambda: None,
        "unknown": lambda: new_token(os.urandom),
        "revoked": lambda: asyncio.run(revoked_token(rig)),
        "half of one": lambda: rig.cluster.token[:-1] + ("A" if rig.cluster.token[-1] != "A" else "Q"),
    }
    token = tokens[kind]()
    before = rig.seen()
    with StateManager(rig.cluster.coordinator_address, token=token, restore_dir=rig.folder) as manager:
        for call in (
            lambda: manager.create_snapshot(rig.one.name),
            lambda: manager.restore_vm(rig.one.snapshot_id, target=rig.target),
            lambda: manager.persist_application_data("task", b"data"),
            lambda: manager.forget(rig.one.snapshot_id),
            lambda: manager.list_vms(),
        ):
            error = error_of(call)
            assert error.code is ErrorCode.UNAUTHENTICATED
            assert not error.retryable
            assert token is None or token[21:] not in f"{error.message}{error.facts}"
    assert rig.seen() == before


class _Ahead(SystemClock):
    """A clock that is fast by more than is tolerated."""

    def now_unix_ms(self) -> int:
        return super().now_unix_ms() + int(10 * CLOCK_TOLERANCE_S * 1000)


@pytest.mark.slow
def test_a_node_whose_clock_is_off_by_minutes_refuses_all_and_stops_nobody(tmp_path: Path) -> None:
    with MemoryCluster() as cluster, cluster.state_manager(restore_dir=tmp_path) as manager:
        whole = make_vm(manager, tmp_path, "before")
        cluster.stop_node(1)
        cluster.node(1)._clock = _Ahead()  # type: ignore[attr-defined]
        cluster.start_node(1)
        with cluster.state_manager(restore_dir=tmp_path, replica_wait_s=0) as fresh:
            fresh.restore_vm(whole.snapshot_id, whole.backup_id, target=tmp_path / "one")
            later = make_vm(fresh, tmp_path, "after")
            fresh.restore_vm(later.snapshot_id, later.backup_id, target=tmp_path / "two")
            assert (tmp_path / "two" / "root.raw").read_bytes() == later.disk.read_bytes()
            cluster.stop_node(0)
            cluster.stop_node(2)
            error = error_of(lambda: fresh.restore_vm(whole.snapshot_id, target=tmp_path / "three"))
            assert error.code in (ErrorCode.DENIED, ErrorCode.UNREACHABLE)
