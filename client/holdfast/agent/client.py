"""A thin client of a host agent: the calls over a Unix socket or TLS, without codec, key or data path of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final

import grpc

from holdfast.results import Progress, ProgressCallback
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MESSAGE_BYTES_MAX, MIB
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.status import error_from_rpc
from holdfast_core.runtime.tls import TlsReader, channel_credentials
from holdfast_proto.v1 import agent_pb2 as pb
from holdfast_proto.v1.agent_pb2_grpc import StateManagerStub

_CHUNK_BYTES: Final = 1 * MIB
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)


class HostAgent:
    """The five calls, made by an agent on this or another host. Safe to share between threads; a context manager."""

    def __init__(self, address: str, *, tls: TlsFiles | None = None) -> None:
        """Bind to an agent at unix:PATH, or at HOST:PORT with TLS. Nothing connects yet.

        Raises:
            HoldfastError: INVALID_ARGUMENT for TLS files that cannot be read.
        """
        self._address = address
        self._channel = (
            grpc.insecure_channel(address, options=_OPTIONS)
            if tls is None
            else grpc.secure_channel(address, channel_credentials(TlsReader(tls).current()), options=_OPTIONS)
        )
        self._stub = StateManagerStub(self._channel)

    def __enter__(self) -> HostAgent:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()

    def register_vm(self, vm_id: str, volumes: dict[str, str], *, replace: bool = False) -> None:
        """Register a VM with sources by volume name; paths are the agent's.

        Raises:
            HoldfastError: as `StateManager.register_vm`; DENIED for paths that the agent does not touch.
        """
        request = pb.RegisterVmRequest(
            vm_id=vm_id, volumes=[pb.Volume(name=name, uri=uri) for name, uri in volumes.items()], replace=replace
        )
        try:
            self._stub.RegisterVm(request)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure

    def create_snapshot(self, vm_id: str, *, progress: ProgressCallback | None = None) -> str:
        """Save a VM's first point; returns its id."""
        answers = self._stub.CreateSnapshot(pb.CreateSnapshotRequest(vm_id=vm_id))
        return str(self._result(answers, "snapshot_id", progress))

    def incremental_backup(self, vm_id: str, snapshot_id: str, *, progress: ProgressCallback | None = None) -> str:
        """Save what changed; returns the backup's id."""
        request = pb.IncrementalBackupRequest(vm_id=vm_id, snapshot_id=snapshot_id)
        return str(self._result(self._stub.IncrementalBackup(request), "backup_id", progress))

    def restore_vm(
        self, snapshot_id: str, backup_id: str = "", *, target: str = "", progress: ProgressCallback | None = None
    ) -> str:
        """Rebuild a VM on the agent's host; returns the directory there."""
        request = pb.RestoreVmRequest(snapshot_id=snapshot_id, backup_id=backup_id, target=target)
        return str(self._result(self._stub.RestoreVm(request), "directory", progress))

    def persist_application_data(self, task_id: str, data: bytes, *, progress: ProgressCallback | None = None) -> str:
        """Store bytes for a task; returns the storage id."""
        answers = self._stub.PersistApplicationData(_messages(task_id, data))
        return str(self._result(answers, "storage_id", progress))

    def retrieve_application_data(self, storage_id: str) -> bytes:
        """Return an object's bytes, which the agent has verified."""
        answers = self._stub.RetrieveApplicationData(pb.RetrieveApplicationDataRequest(storage_id=storage_id))
        return b"".join([answer.data for answer in self._each(answers)])

    def discard_vm(self, vm_id: str) -> pb.Receipt:
        """End a VM's life once all that its keep rules name is kept; returns the receipt."""
        receipt = self._result(self._stub.DiscardVm(pb.DiscardVmRequest(vm_id=vm_id)), "receipt", None)
        assert isinstance(receipt, pb.Receipt), "the field has that type"
        return receipt

    def _each(self, answers: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from answers
        except grpc.RpcError as failure:
            raise self._error(failure) from failure

    def _error(self, failure: grpc.RpcError) -> HoldfastError:
        assert isinstance(failure, grpc.Call), "what a call raises says how the call ended"
        return error_from_rpc(failure, peer=f"agent {self._address}")

    def _result(self, answers: Iterable[Any], field: str, progress: ProgressCallback | None) -> object:
        """Read a stream to its end and return what its last message brings.

        Raises:
            HoldfastError: what the agent answered; INTERNAL if it ended without a result.
        """
        result: object = None
        for answer in self._each(answers):
            if answer.WhichOneof("event") == field:
                result = getattr(answer, field)
            elif progress is not None:
                told = answer.progress
                progress(Progress(told.phase, told.bytes_done, told.bytes_total))
        if result is None:
            raise HoldfastError(ErrorCode.INTERNAL, f"the agent at {self._address} ended a call without a result")
        return result


def _messages(task_id: str, data: bytes) -> Iterator[pb.PersistApplicationDataRequest]:
    yield pb.PersistApplicationDataRequest(task_id=task_id, data=data[:_CHUNK_BYTES])
    for at in range(_CHUNK_BYTES, len(data), _CHUNK_BYTES):
        yield pb.PersistApplicationDataRequest(data=data[at : at + _CHUNK_BYTES])
