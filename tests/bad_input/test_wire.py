"""Bad input past the SDK: what the services say to any client, by gRPC status and by code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from holdfast import ErrorCode
from holdfast_core.model.block import block_id
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_MAX, IDS_PER_REQUEST_MAX, NAME_CHARS_MAX
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc, records_pb2, state_pb2
from tests.bad_input.rig import (
    UNKNOWN_BACKUP,
    UNKNOWN_OBJECT,
    UNKNOWN_SNAPSHOT,
    Rig,
    expect_refusal,
    open_object_session,
    raw_stub,
)

NONCE = b"0123456789abcdef"


@pytest.fixture
def stub(rig: Rig) -> Iterator[Any]:
    with raw_stub(rig.cluster) as raw:
        yield raw


def begin(vm_id: str, snapshot_id: str = "", parent_id: str = "") -> state_pb2.BeginPointRequest:
    """A Begin of a snapshot, or of a backup where a snapshot is named."""
    return state_pb2.BeginPointRequest(
        vm_id=vm_id, snapshot_id=snapshot_id, parent_id=parent_id, incremental=bool(snapshot_id), nonce=NONCE
    )


def register(vm_id: str, volume: str = "root") -> state_pb2.RegisterVmRequest:
    """A registration with one volume."""
    volumes = [records_pb2.VolumeSpec(name=volume, uri="/disk.raw", block_bytes=65536)]
    return state_pb2.RegisterVmRequest(vm=records_pb2.VmRecord(vm_id=vm_id, volumes=volumes))


Case = tuple[str, Callable[[Rig], Any], ErrorCode]

CASES: list[Case] = [
    ("BeginPoint", lambda rig: begin("nobody"), ErrorCode.NOT_FOUND),
    ("BeginPoint", lambda rig: begin("one", UNKNOWN_SNAPSHOT), ErrorCode.NOT_FOUND),
    ("BeginPoint", lambda rig: begin("one", rig.two.snapshot_id), ErrorCode.MISMATCH),
    ("BeginPoint", lambda rig: begin("one", rig.one.snapshot_id, rig.two.backup_id), ErrorCode.MISMATCH),
    ("BeginPoint", lambda rig: begin("../one"), ErrorCode.INVALID_ARGUMENT),
    ("BeginPoint", lambda rig: begin(""), ErrorCode.INVALID_ARGUMENT),
    ("BeginPoint", lambda rig: state_pb2.BeginPointRequest(vm_id="one"), ErrorCode.INVALID_ARGUMENT),
    ("RegisterVm", lambda rig: register(""), ErrorCode.INVALID_ARGUMENT),
    ("RegisterVm", lambda rig: register("x" * (NAME_CHARS_MAX + 1)), ErrorCode.INVALID_ARGUMENT),
    ("RegisterVm", lambda rig: register("a/b"), ErrorCode.INVALID_ARGUMENT),
    ("RegisterVm", lambda rig: register("good", "../root"), ErrorCode.INVALID_ARGUMENT),
    ("RegisterVm", lambda rig: register("one"), ErrorCode.ALREADY_EXISTS),
    ("GetPoint", lambda rig: state_pb2.GetPointRequest(point_id=UNKNOWN_BACKUP), ErrorCode.NOT_FOUND),
    ("GetPoint", lambda rig: state_pb2.GetPointRequest(point_id="../x"), ErrorCode.INVALID_ARGUMENT),
    (
        "ResolvePoint",
        lambda rig: state_pb2.ResolvePointRequest(snapshot_id=rig.one.snapshot_id, backup_id=rig.two.backup_id),
        ErrorCode.MISMATCH,
    ),
    ("ResolveObject", lambda rig: state_pb2.ResolveObjectRequest(storage_id=UNKNOWN_OBJECT), ErrorCode.NOT_FOUND),
    ("ResolveObject", lambda rig: state_pb2.ResolveObjectRequest(storage_id="a/b"), ErrorCode.INVALID_ARGUMENT),
    ("ForgetPoint", lambda rig: state_pb2.ForgetPointRequest(point_id=UNKNOWN_SNAPSHOT), ErrorCode.NOT_FOUND),
    ("KeepAlive", lambda rig: state_pb2.KeepAliveRequest(session_id=UNKNOWN_SNAPSHOT), ErrorCode.SESSION_LAPSED),
    ("ReportDamage", lambda rig: state_pb2.ReportDamageRequest(block_ids=b"x" * 33), ErrorCode.INVALID_ARGUMENT),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{at}-{case[0]}" for at, case in enumerate(CASES)])
def test_the_coordinator_refuses_by_itself(rig: Rig, stub: Any, case: Case) -> None:
    method, request, code = case
    before = rig.seen()
    expect_refusal(lambda: getattr(stub, method)(request(rig), timeout=10), code)
    assert rig.seen() == before


class Node:
    """A storage node under the capability of a session for an object."""

    def __init__(self, begun: state_pb2.BeginObjectResponse) -> None:
        self._metadata = (("holdfast-capability", begun.grant.capability),)
        self._channel = grpc.insecure_channel(
            begun.grant.nodes[0].address, options=[("grpc.max_send_message_length", 64 << 20)]
        )
        self._stub = blocks_pb2_grpc.BlockServiceStub(self._channel)
        self._epoch = begun.grant.layouts[0].epoch

    def has(self, block_ids: bytes) -> Any:
        """HasBlocks."""
        return self._stub.HasBlocks(
            blocks_pb2.HasBlocksRequest(block_ids=block_ids), metadata=self._metadata, timeout=10
        )

    def put(self, *, block_ids: bytes, lengths: list[int], blocks: bytes) -> Any:
        """PutBlocks with one batch."""
        batch = blocks_pb2.PutBlocksRequest(
            sequence=1, layout_epoch=self._epoch, block_ids=block_ids, lengths=lengths, blocks=blocks
        )
        return list(self._stub.PutBlocks(iter([batch]), metadata=self._metadata, timeout=10))

    def without_capability(self) -> Any:
        """HasBlocks as anybody."""
        return self._stub.HasBlocks(blocks_pb2.HasBlocksRequest(block_ids=b"x" * 32), timeout=10)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


@pytest.fixture
def node(stub: Any) -> Iterator[Node]:
    begun = open_object_session(stub)
    opened = Node(begun)
    yield opened
    opened.close()
    stub.AbortSession(state_pb2.AbortSessionRequest(session_id=begun.session_id), timeout=10)


def test_a_block_id_of_the_wrong_length(rig: Rig, node: Node) -> None:
    before = rig.seen()
    expect_refusal(lambda: node.has(b"x" * 33), ErrorCode.INVALID_ARGUMENT)
    expect_refusal(lambda: node.put(block_ids=b"x" * 31, lengths=[4], blocks=b"data"), ErrorCode.INVALID_ARGUMENT)
    assert rig.seen() == before


def test_a_batch_above_the_limit(rig: Rig, node: Node) -> None:
    before = rig.seen()
    large = bytes(BATCH_BYTES_MAX + 1)
    many = BATCH_BLOCKS_MAX + 1
    expect_refusal(
        lambda: node.put(block_ids=block_id(large), lengths=[len(large)], blocks=large), ErrorCode.LIMIT_EXCEEDED
    )
    expect_refusal(
        lambda: node.put(block_ids=bytes(32 * many), lengths=[1] * many, blocks=bytes(many)), ErrorCode.LIMIT_EXCEEDED
    )
    expect_refusal(lambda: node.has(bytes(32 * (IDS_PER_REQUEST_MAX + 1))), ErrorCode.LIMIT_EXCEEDED)
    assert rig.seen() == before


def test_bytes_that_do_not_match_their_id(rig: Rig, node: Node) -> None:
    data = b"HFB1" + bytes(80)
    wrong = block_id(b"something else")
    expect_refusal(lambda: node.put(block_ids=wrong, lengths=[len(data)], blocks=data), ErrorCode.CORRUPT)
    assert node.has(wrong).verdicts == bytes([blocks_pb2.VERDICT_MISSING])
    # The right hash over what is no sealed block is refused too: an id says what the bytes are, not what they mean.
    right = block_id(data)
    expect_refusal(lambda: node.put(block_ids=right, lengths=[len(data)], blocks=data), ErrorCode.CORRUPT)
    assert node.has(right).verdicts == bytes([blocks_pb2.VERDICT_MISSING])


def test_a_node_without_a_capability(node: Node) -> None:
    expect_refusal(node.without_capability, ErrorCode.DENIED)
