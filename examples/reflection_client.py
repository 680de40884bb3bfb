"""The calls of a host agent without a line of generated code: what it offers is asked of the agent itself.

Any language with a gRPC reflection client can do the same; one with protoc makes a stub of agent.proto alone.

holdfast agent --listen unix:/run/holdfast-agent.sock &
python examples/reflection_client.py unix:/run/holdfast-agent.sock /srv/vms/web-1.raw /srv/restored
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "holdfast.agent.v1.StateManager"


class Agent:
    """An agent as it describes itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Ask for the service's description."""
        self._channel = channel
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self._service = pool.FindServiceByName(SERVICE)

    def call(self, name: str, **fields: Any) -> Iterator[Any]:
        """Make a call with one request; yields its answers."""
        return self.send(name, [fields])

    def send(self, name: str, requests: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """Make a call with a stream of requests, or with the only one; yields its answers."""
        method = self._service.methods_by_name[name]
        request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        ask = getattr(self._channel, kind)(
            f"/{SERVICE}/{name}", request_serializer=request.SerializeToString, response_deserializer=answer.FromString
        )
        messages = (request(**fields) for fields in requests)
        answers = ask(messages if method.client_streaming else next(messages))
        yield from answers if method.server_streaming else [answers]


def result(answers: Iterator[Any]) -> Any:
    """Return what the last answer brings, and print the progress before it."""
    found = None
    for answer in answers:
        event = answer.WhichOneof("event")
        if event == "progress":
            print(f"  {answer.progress.phase}: {answer.progress.bytes_done} of {answer.progress.bytes_total}")
        else:
            found = getattr(answer, event)
    return found


def main(address: str, disk: str, target: str) -> int:
    """Make the five calls; 0 if the application data came back as it was."""
    with grpc.insecure_channel(address) as channel:
        agent = Agent(channel)
        list(agent.call("RegisterVm", vm_id="web-1", volumes=[{"name": "root", "uri": disk}]))
        snapshot_id = result(agent.call("CreateSnapshot", vm_id="web-1"))
        backup_id = result(agent.call("IncrementalBackup", vm_id="web-1", snapshot_id=snapshot_id))
        where = result(agent.call("RestoreVm", snapshot_id=snapshot_id, backup_id=backup_id, target=target))
        pieces: list[dict[str, Any]] = [{"task_id": "task-42", "data": b"what the "}, {"data": b"task made"}]
        storage_id = result(agent.send("PersistApplicationData", pieces))
        data = b"".join(answer.data for answer in agent.call("RetrieveApplicationData", storage_id=storage_id))
    print(f"{backup_id} is in {where}; {storage_id} holds {data!r}")
    return 0 if data == b"what the task made" else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
