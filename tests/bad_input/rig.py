"""One cluster in memory, a VM with a history, raw calls past the SDK, and what can be seen from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from holdfast import ErrorCode, HoldfastError, StateManager
from holdfast.testing import MemoryCluster
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.status import ERROR_METADATA_KEY, status_name
from holdfast_proto.v1 import common_pb2, state_pb2, state_pb2_grpc

UNKNOWN_SNAPSHOT = "snap-" + "a" * 26
UNKNOWN_BACKUP = "bkp-" + "a" * 26
UNKNOWN_OBJECT = "app-" + "a" * 26
BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """A registered VM with one volume, a snapshot and a backup."""

    name: str
    disk: Path
    snapshot_id: str
    backup_id: str


def make_vm(manager: StateManager, folder: Path, name: str) -> Vm:
    """Register a VM, snapshot it, change it, back it up."""
    disk = folder / f"{name}.raw"
    disk.write_bytes(name.encode() * BLOCK_BYTES)
    manager.register_vm(name, {"root": str(disk)})
    snapshot_id = manager.create_snapshot(name)
    disk.write_bytes(name.upper().encode() * BLOCK_BYTES)
    return Vm(name=name, disk=disk, snapshot_id=snapshot_id, backup_id=manager.incremental_backup(name, snapshot_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """What a row acts on: two VMs, a stored object, a folder of its own, and the coordinator's raw stub."""

    cluster: MemoryCluster
    manager: StateManager
    one: Vm
    two: Vm
    storage_id: str
    folder: Path

    @property
    def target(self) -> Path:
        """Where a restore would write; does not exist."""
        return self.folder / "target"

    def seen(self) -> tuple[Any, ...]:
        """Everything that a failed call could have left: points, objects, open sessions, files."""
        status = self.manager.cluster_status()
        points = [point.point_id for vm in self.manager.list_vms() for point in self.manager.points(vm.vm_id)]
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return status.vm_count, points, status.object_count, status.session_count, files, self.target.exists()


class _Shown(grpc.UnaryUnaryClientInterceptor):
    """Shows a token with each call."""

    def __init__(self, token: str) -> None:
        self._metadata = Credential(token=token).metadata()

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_Details(client_call_details, self._metadata), request)


class _Details(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self.method, self.timeout, self.metadata = details.method, details.timeout, metadata
        self.credentials, self.wait_for_ready = details.credentials, details.wait_for_ready
        self.compression = details.compression


@contextlib.contextmanager
def raw_stub(cluster: MemoryCluster) -> Iterator[Any]:
    """The coordinator's state service without the SDK in front, as another client would speak to it."""
    with grpc.insecure_channel(cluster.coordinator_address) as channel:
        yield state_pb2_grpc.StateServiceStub(grpc.intercept_channel(channel, _Shown(cluster.token)))


def open_object_session(stub: Any) -> state_pb2.BeginObjectResponse:
    """A session for an object, whose grant carries a capability to put and has."""
    begun: state_pb2.BeginObjectResponse = stub.BeginObject(
        state_pb2.BeginObjectRequest(task_id="raw", nonce=b"n" * 16), timeout=10
    )
    return begun


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """(gRPC status, code) of the error that a raw call ends with."""
    try:
        call()
    except grpc.RpcError as error:
        detail = common_pb2.ErrorDetail()
        trailing: Any = error.trailing_metadata()
        for key, value in trailing:
            if key == ERROR_METADATA_KEY:
                detail.ParseFromString(value)
        assert detail.message
        return error.code().name, detail.code
    raise AssertionError("the call was taken")


def expect_refusal(call: Callable[[], Any], code: ErrorCode) -> None:
    """Check that a raw call ends with an error of ours and with the gRPC status that goes with it."""
    assert refusal(call) == (status_name(code), code.name)


def error_of(call: Callable[[], Any]) -> HoldfastError:
    """The error that a call of the SDK ends with."""
    try:
        call()
    except HoldfastError as error:
        return error
    raise AssertionError("the call was taken")
