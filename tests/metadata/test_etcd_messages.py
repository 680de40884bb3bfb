"""Our declaration of etcd's protocol: it keeps out of the way of other clients in the same process."""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool

from holdfast_core.runtime.metadata.etcd_watch import end_key, first_key
from holdfast_proto.v1 import etcd_pb2


def test_another_client_can_be_loaded_beside_ours() -> None:
    """Names of files, messages and services are global; other clients bring etcd's own, and rpc.proto or kv.proto."""
    ours = etcd_pb2.DESCRIPTOR
    assert ours.package == "holdfast.v1.etcd"
    assert not ours.services_by_name
    pool = descriptor_pool.Default()
    for name, package in (("rpc.proto", "etcdserverpb"), ("kv.proto", "mvccpb")):
        file = descriptor_pb2.FileDescriptorProto(name=name, package=package, syntax="proto3")
        for message in ours.message_types_by_name:
            file.message_type.add(name=message)
        pool.Add(file)
        assert pool.FindFileByName(name).package == package


def test_a_prefix_is_a_range() -> None:
    assert (first_key(b"a/"), end_key(b"a/")) == (b"a/", b"a0")
    assert (first_key("é".encode()), end_key("é".encode())) == (b"\xc3\xa9", b"\xc3\xaa")
    assert (first_key(b""), end_key(b"")) == (b"\x00", b"\x00")
