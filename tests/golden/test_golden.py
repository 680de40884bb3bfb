"""The bytes of every format are what they were, and the bytes that were still read."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from holdfast.serving.overlay import Manifest
from holdfast.serving.unit_map import UnitMap
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.block import Codec, Kind, block_id, parse_header, verify
from holdfast_core.model.files.sets import TRAILER_BYTES, decode_manifest, decode_trailer
from holdfast_core.model.keys import TenantSecrets, unwrap_secret
from holdfast_core.model.layout import Layout
from holdfast_core.model.lifecycle import keep_digest
from holdfast_core.model.records import check_object, check_point
from holdfast_core.model.tree import decode_node
from holdfast_proto.v1 import common_pb2, records_pb2
from tests.golden import regenerate
from tests.golden.formats import (
    AUDIT_SIGNERS,
    BASE,
    BASE_ID,
    FILE_ENTRIES,
    FOLDER,
    FORMATS,
    MASTER,
    OBJECT_INNER,
    OBJECT_LEAF,
    OVERLAY,
    RING,
    SECRETS,
    TEXT,
    VOLUME_INNER,
    VOLUME_LEAF,
    audit_records,
    filler,
)


def golden(name: str) -> bytes:
    """The bytes of a golden file."""
    return (FOLDER / name).read_bytes()


# What a compressor makes may change with its library's version, within the format; such blocks must only open.
COMPRESSED = {"block-lz4.bin", "block-zstd.bin", "block-zstd-delta.bin", "file-set.bin"}


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - COMPRESSED))
def test_the_bytes_are_what_they_were(name: str) -> None:
    assert FORMATS[name]().hex() == golden(name).hex()


def test_no_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "codec", "kind", "epoch", "plain"),
    [
        ("block-stored.bin", Codec.STORED, Kind.VOLUME, 1, filler("noise", 100)),
        ("block-lz4.bin", Codec.LZ4, Kind.APPLICATION, 2, TEXT),
        ("block-zstd.bin", Codec.ZSTD, Kind.VOLUME, 2, TEXT),
        ("block-zstd-delta.bin", Codec.ZSTD_DELTA, Kind.VOLUME, 2, TEXT + filler("new", 40)),
        ("block-index.bin", Codec.STORED, Kind.INDEX, 1, golden("node-volume-leaf.bin")),
    ],
)
def test_old_blocks_still_open(name: str, codec: Codec, kind: Kind, epoch: int, plain: bytes) -> None:
    data = golden(name)
    block = verify(block_id(data), data)
    header = parse_header(data)
    assert (header.codec, header.kind, header.key_epoch, header.plain_bytes) == (codec, kind, epoch, len(plain))
    assert RING.opener().open(block, base_plain=BASE, base_id=BASE_ID) == plain


def test_old_nodes_still_decode() -> None:
    nodes = {name: decode_node(golden(name)) for name in FORMATS if name.startswith("node-")}
    assert nodes == {
        "node-volume-leaf.bin": VOLUME_LEAF,
        "node-volume-inner.bin": VOLUME_INNER,
        "node-object-leaf.bin": OBJECT_LEAF,
        "node-object-inner.bin": OBJECT_INNER,
    }


def test_old_records_still_pass() -> None:
    point = records_pb2.PointRecord.FromString(golden("point-record.pb"))
    check_point(RING, point)
    check_object(RING, records_pb2.ObjectRecord.FromString(golden("object-record.pb")))
    assert records_pb2.PointRecord.FromString(golden("point-record-forgotten.pb")).forgotten
    assert records_pb2.VmRecord.FromString(golden("vm-record.pb")).vm_id == point.vm_id
    assert records_pb2.SessionRecord.FromString(golden("session-record.pb")).session_id == point.point_id


def test_records_of_a_whole_life_still_pass() -> None:
    point = records_pb2.PointRecord.FromString(golden("point-record-lifecycle.pb"))
    check_point(RING, point)
    stored = records_pb2.ObjectRecord.FromString(golden("object-record-files.pb"))
    check_object(RING, stored)
    vm = records_pb2.VmRecord.FromString(golden("vm-record-lifecycle.pb"))
    session = records_pb2.SessionRecord.FromString(golden("session-record-lifecycle.pb"))
    assert list(vm.labels) == list(point.labels) == list(session.labels)
    assert keep_digest(vm.keep[0]) == stored.origin.keep_digest
    assert vm.keep[0].name == stored.origin.keep_rule


def test_old_secrets_still_unwrap() -> None:
    wrapped = records_pb2.WrappedSecret.FromString(golden("wrapped-secret.pb"))
    assert unwrap_secret(MASTER, wrapped, "tenant 1") == b"a secret"
    assert TenantSecrets.from_message(common_pb2.TenantKeys.FromString(golden("tenant-keys.pb"))) == SECRETS


def test_old_layouts_still_read() -> None:
    layout = Layout.from_message(common_pb2.Layout.FromString(golden("layout.pb")))
    assert (layout.epoch, layout.partitions, layout.replicas, len(layout.nodes)) == (5, 4, 2, 4)


def test_old_exports_of_the_audit_log_still_pass() -> None:
    lines = golden("audit-export.jsonl").splitlines(keepends=True)
    verified = verify_export(lines, trusted=[AUDIT_SIGNERS[0].public_key])
    assert (verified.records, verified.head.key_id) == (4, AUDIT_SIGNERS[1].key_id)
    assert [AuditRecord.from_line(lines[at]) for at in (1, 2, 3, 5)] == audit_records()


def plain_root(lines: list[bytes]) -> bytes:
    """The root of the audit log's tree, as docs/formats.md defines it."""
    if len(lines) == 1:
        return hashlib.sha256(b"\0" + lines[0]).digest()
    half = 1 << (len(lines) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + plain_root(lines[:half]) + plain_root(lines[half:])).digest()


def test_an_export_can_be_checked_without_us() -> None:
    """From the description of the format alone: nothing here is the verifier's own code."""
    lines = golden("audit-export.jsonl").removesuffix(b"\n").split(b"\n")
    log = json.loads(lines[0])
    keys = {each["key_id"]: bytes.fromhex(each["public_key"]) for each in log["keys"]}
    records: list[bytes] = []
    for line in lines[1:]:
        head = json.loads(line)
        if "type" not in head:
            assert head["sequence"] == len(records)
            records.append(line)
            continue
        assert (head["size"], head["root"]) == (len(records), plain_root(records).hex())
        signed = b"holdfast v1 audit head\0" + log["cluster_id"].encode() + b"\0"
        signed += struct.pack("<QQ", head["size"], head["time_unix_ms"]) + bytes.fromhex(head["root"])
        Ed25519PublicKey.from_public_bytes(keys[head["key_id"]]).verify(bytes.fromhex(head["signature"]), signed)
    assert head["size"] == 4


def test_an_old_set_of_files_is_still_read() -> None:
    data = golden("file-set.bin")
    trailer = decode_trailer(data[-TRAILER_BYTES:], object_bytes=len(data))
    assert trailer.content_bytes == 8199
    assert data[:8199] == filler("weights", 8199)
    assert tuple(decode_manifest(data[trailer.content_bytes : -TRAILER_BYTES], trailer)) == FILE_ENTRIES


def test_files_are_rewritten_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in FOLDER.iterdir()}
    assert regenerate.main([]) == regenerate.main(["--yes"]) == 2
    assert "nothing written" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in FOLDER.iterdir()} == before


def test_an_overlay_is_still_known() -> None:
    assert Manifest.from_json(golden("overlay.json").decode(), FOLDER) == OVERLAY
    units = UnitMap(40_000)
    units.load(1, golden("overlay-map-page.bin"))
    assert [(first, end) for first, end, held in units.runs(0, 40_000) if held] == [(32_768, 32_778), (39_999, 40_000)]
