"""One example of every format, made from fixed inputs. `test_golden` compares them with the files beside it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holdfast.serving.overlay import Manifest, OverlayVolume
from holdfast.serving.unit_map import UnitMap
from holdfast_core.model.audit.export import export_lines
from holdfast_core.model.audit.heads import HeadSigner, head_input
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.audit.record import ROTATE_AUDIT_ACTION, AuditRecord
from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.files.sets import encode_end
from holdfast_core.model.keys import KeyRing, TenantSecrets, wrap_secret
from holdfast_core.model.layout import Layout, LayoutNode
from holdfast_core.model.lifecycle import keep_digest
from holdfast_core.model.records import object_mac, object_mac_input, point_mac, point_mac_input
from holdfast_core.model.tree import ObjectInner, ObjectLeaf, VolumeInner, VolumeLeaf, encode_node
from holdfast_proto.v1 import audit_pb2, files_pb2, records_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

FOLDER: Final = Path(__file__).parent / "files"

MASTER: Final = bytes(range(32, 64))
NONCE: Final = b"ABCDEFGHIJKLMNOPQRSTUVWX"
TEXT: Final = b"Holdfast keeps the state of stateless VMs. " * 12
BASE: Final = TEXT.replace(b"stateless", b"stateful!")
BASE_ID: Final = bytes(range(64, 96))


def filler(label: str, size: int = 32) -> bytes:
    """Fixed bytes that do not compress."""
    return hashlib.shake_128(label.encode()).digest(size)


SECRETS: Final = TenantSecrets(
    tenant=1,
    data_root=filler("data root"),
    data_epochs={1: filler("data epoch 1"), 2: filler("data epoch 2")},
    structure_root=filler("structure root"),
    structure_epochs={1: filler("structure epoch 1")},
)
RING: Final = KeyRing(SECRETS)

VOLUME_LEAF: Final = VolumeLeaf(
    (0, 1, 127),
    (filler("fingerprint 0"), filler("fingerprint 1"), filler("fingerprint 2")),
    (filler("block 0"), filler("block 1"), filler("block 2")),
    (b"", filler("base 1"), b""),
)
VOLUME_INNER: Final = VolumeInner(2, (3, 64), (filler("child 0"), filler("child 1")))
OBJECT_LEAF: Final = ObjectLeaf(
    (65_536, 1), (filler("fingerprint 0"), filler("fingerprint 1")), (filler("block 0"), filler("block 1"))
)
OBJECT_INNER: Final = ObjectInner(1, (filler("child 0"), filler("child 1")), (2**33, 77))


def sealed(codec: Codec, kind: Kind, epoch: int, plain: bytes) -> SealedBlock:
    """A block of the tests' tenant."""
    base = (BASE_ID, BASE) if codec is Codec.ZSTD_DELTA else None
    return RING.sealer(kind, epoch).seal(plain, codec=codec, base=base)


def volumes() -> list[records_pb2.VolumeRecord]:
    """The volumes of the example point."""
    return [
        records_pb2.VolumeRecord(
            name="root",
            size_bytes=4 * 2**30,
            block_bytes=65_536,
            root=filler("root of root"),
            consistency=records_pb2.CONSISTENCY_OFFLINE,
            block_count=20_000,
        ),
        records_pb2.VolumeRecord(
            name="data", size_bytes=2**20, block_bytes=16_384, consistency=records_pb2.CONSISTENCY_FUZZY
        ),
    ]


def stats() -> records_pb2.TransferStats:
    """Distinct numbers in every field."""
    fields = records_pb2.TransferStats.DESCRIPTOR.fields
    return records_pb2.TransferStats(**{field.name: 1000 + field.number for field in fields if field.number <= 11})


def point_record() -> bytes:
    """A backup."""
    mac = point_mac(RING, tenant=1, point_id="bkp-b", vm_id="vm-1", parent_id="snap-a", volumes=volumes())
    return records_pb2.PointRecord(
        point_id="bkp-b",
        vm_id="vm-1",
        parent_id="snap-a",
        created_unix_ms=1_800_000_000_123,
        volumes=volumes(),
        mac=mac,
        stats=stats(),
        number=2,
        tenant=1,
    ).SerializeToString(deterministic=True)


def forgotten_point() -> bytes:
    """A lineage stub."""
    return records_pb2.PointRecord(
        point_id="snap-a", vm_id="vm-1", created_unix_ms=1_800_000_000_000, number=1, forgotten=True, tenant=1
    ).SerializeToString(deterministic=True)


def object_record() -> bytes:
    """A stored object."""
    root = filler("root of object")
    return records_pb2.ObjectRecord(
        storage_id="app-c",
        task_id="task-1",
        size_bytes=123_456,
        root=root,
        created_unix_ms=1_800_000_000_456,
        mac=object_mac(RING, tenant=1, storage_id="app-c", task_id="task-1", size_bytes=123_456, root=root),
        stats=stats(),
        block_count=2,
        tenant=1,
    ).SerializeToString(deterministic=True)


def vm_record() -> bytes:
    """A registration."""
    spec = records_pb2.VolumeSpec(
        name="root", uri="/images/root.raw", block_bytes=65_536, live=True, codec=records_pb2.CODEC_CHOICE_ZSTD
    )
    return records_pb2.VmRecord(vm_id="vm-1", volumes=[spec], created_unix_ms=1_799_999_999_999).SerializeToString(
        deterministic=True
    )


LABELS: Final = (records_pb2.Label(name="owner", value="team-7"), records_pb2.Label(name="task", value="train"))
KEEP_RULE: Final = records_pb2.KeepRule(
    name="weights",
    task_id="task-1",
    volume="root",
    partition=1,
    include=["**/*.safetensors"],
    exclude=["/tmp/**"],
    exclude_secrets=True,
)


def vm_record_lifecycle() -> bytes:
    """A registration with all that a VM carries; its definition has a key of its own."""
    vm = records_pb2.VmRecord.FromString(vm_record())
    vm.labels.extend(LABELS)
    vm.definition_name = "domain.xml"
    vm.template_id = "snap-z"
    vm.keep.append(KEEP_RULE)
    vm.discarding_unix_ms = 1_800_000_009_000
    return vm.SerializeToString(deterministic=True)


def point_record_lifecycle() -> bytes:
    """A point with the labels of its VM, of a volume that was read by what a tracker named."""
    point = records_pb2.PointRecord.FromString(point_record())
    point.labels.extend(LABELS)
    point.definition_name = "domain.xml"
    point.volumes[0].reading = records_pb2.READING_CHANGED
    point.volumes[1].reading = records_pb2.READING_COMPARED
    point.volumes[1].reading_note = "the bitmap is gone"
    return point.SerializeToString(deterministic=True)


def session_record_lifecycle() -> bytes:
    """An open session with the labels of its VM."""
    session = records_pb2.SessionRecord.FromString(session_record())
    session.principal = "agent-7"
    session.labels.extend(LABELS)
    session.definition_name = "domain.xml"
    return session.SerializeToString(deterministic=True)


def object_record_files() -> bytes:
    """A stored set of files that fulfils a keep rule."""
    stored = records_pb2.ObjectRecord.FromString(object_record())
    stored.form = records_pb2.OBJECT_FORM_FILES
    stored.origin.CopyFrom(
        records_pb2.ObjectOrigin(
            vm_id="vm-1",
            point_id="bkp-b",
            volume="root",
            keep_rule="weights",
            keep_digest=keep_digest(KEEP_RULE),
            file_count=3,
        )
    )
    return stored.SerializeToString(deterministic=True)


def session_record() -> bytes:
    """An open session."""
    return records_pb2.SessionRecord(
        session_id="bkp-b",
        vm_id="vm-1",
        parent_id="snap-a",
        base_id="snap-z",
        pinned_roots=filler("root of root") + filler("root of base"),
        collection_epoch=5,
        key_epoch=2,
        started_unix_ms=1_800_000_000_001,
        lease_id=42,
    ).SerializeToString(deterministic=True)


def layout_message() -> bytes:
    """A small layout with made-up owners."""
    nodes = tuple(LayoutNode(f"node-{number}", f"zone-{number % 3}", (number + 1) * 10**12) for number in range(4))
    owners = struct.pack("<8H", 0, 1, 1, 2, 2, 3, 3, 0)
    layout = Layout(epoch=5, seed=7, partitions=4, replicas=2, nodes=nodes, owners=owners)
    return layout.to_message().SerializeToString(deterministic=True)


def point_mac_bytes() -> bytes:
    """What a point's MAC covers."""
    return point_mac_input(tenant=1, point_id="bkp-b", vm_id="vm-1", parent_id="snap-a", volumes=volumes())


def object_mac_bytes() -> bytes:
    """What an object's MAC covers."""
    root = filler("root of object")
    return object_mac_input(tenant=1, storage_id="app-c", task_id="task-1", size_bytes=123_456, root=root)


AUDIT_SIGNERS: Final = tuple(
    HeadSigner(f"audit-{number}", filler(f"audit key {number}"), "0123456789abcdef" * 2) for number in (1, 2)
)


def audit_records() -> list[AuditRecord]:
    """Four records: a denial, two that did something, and the introduction of a key."""
    second = AUDIT_SIGNERS[1]
    calls: tuple[tuple[str, str, str, str, str, dict[str, str]], ...] = (
        ("agent-7", "default", "snapshot.create", "vm/web-1", "OK", {"step": "begin", "point": "snap-a"}),
        ("Zoë", "default", "point.restore", "vm/web-1", "DENIED", {}),
        (
            "admin",
            "",
            ROTATE_AUDIT_ACTION,
            "cluster",
            "OK",
            {"key_id": second.key_id, "public_key": second.public_key.hex()},
        ),
        ("agent-7", "default", "snapshot.create", "vm/web-1", "REPEATED", {"step": "commit", "point": "snap-a"}),
    )
    return [
        AuditRecord(
            sequence=sequence,
            time_unix_ms=1_800_000_000_000 + sequence,
            principal=principal,
            tenant=tenant,
            action=action,
            resource=resource,
            outcome=outcome,
            request_id=filler(f"request {sequence}", 8).hex(),
            entry_id=filler(f"entry {sequence}", 8).hex(),
            details=details,
        )
        for sequence, (principal, tenant, action, resource, outcome, details) in enumerate(calls)
    ]


def audit_export() -> bytes:
    """A log of three records under the first key and one under the second."""
    lines, tree = [record.to_line() for record in audit_records()], Frontier()
    message = audit_pb2.ExportAuditRecordsResponse(
        cluster_id="0123456789abcdef" * 2,
        keys=[audit_pb2.AuditKey(key_id=each.key_id, public_key=each.public_key) for each in AUDIT_SIGNERS],
    )
    for signer, batch in zip(AUDIT_SIGNERS, (lines[:3], lines[3:]), strict=True):
        first, tree = tree.size, tree.extended(map(leaf_hash, batch))
        head = signer.sign(size=tree.size, root=tree.root, time_unix_ms=1_800_000_000_010 + first)
        message.batches.add(first=first, lines=batch, head=head)
    return b"".join(line + b"\n" for line in export_lines([message]))


def audit_head_input() -> bytes:
    """What a head's signature is over."""
    return head_input("0123456789abcdef" * 2, 3, 1_800_000_000_010, filler("root of log"))


FILE_ENTRIES: Final = (
    FileEntry(path=b"dir", kind=files_pb2.FILE_KIND_DIRECTORY, mode=0o2755, uid=1000, gid=100, mtime_s=-1, mtime_ns=5),
    FileEntry(
        path=b"dir/weights \xff",
        kind=files_pb2.FILE_KIND_REGULAR,
        mode=0o640,
        mtime_s=1_800_000_000,
        size_bytes=2**33 + 7,
        extents=[
            files_pb2.FileExtent(offset=0, length=8192),
            files_pb2.FileExtent(offset=2**33, length=7),
        ],
    ),
    FileEntry(path=b"fifo", kind=files_pb2.FILE_KIND_FIFO, mode=0o600),
    FileEntry(path=b"link", kind=files_pb2.FILE_KIND_SYMBOLIC_LINK, mode=0o777, target=b"../dir"),
    FileEntry(path=b"null", kind=files_pb2.FILE_KIND_CHARACTER_DEVICE, mode=0o666, device_major=1, device_minor=3),
    FileEntry(path=b"second name", kind=files_pb2.FILE_KIND_HARD_LINK, mode=0o640, target=b"dir/weights \xff"),
)


def file_set() -> bytes:
    """A set of files: content, manifest, trailer."""
    content = filler("weights", 8199)
    return content + encode_end(FILE_ENTRIES, content_bytes=len(content))


OVERLAY: Final = Manifest(
    "web-1",
    "bkp-abcdefghijklmnopqrstuvwxyz",
    (OverlayVolume("data", 2**20 + 512, 16_384), OverlayVolume("root", 4 * 2**30, 65_536)),
)


def overlay_map_page() -> bytes:
    """The second page of a map in which units 32,768 to 32,777 and the last one are held."""
    units = UnitMap(40_000)
    units.add(32_768, 32_778)
    units.add(39_999, 40_000)
    return units.take_changed()[1]


FORMATS: Final[dict[str, Callable[[], bytes]]] = {
    "block-stored.bin": lambda: sealed(Codec.STORED, Kind.VOLUME, 1, filler("noise", 100)).data,
    "block-lz4.bin": lambda: sealed(Codec.LZ4, Kind.APPLICATION, 2, TEXT).data,
    "block-zstd.bin": lambda: sealed(Codec.ZSTD, Kind.VOLUME, 2, TEXT).data,
    "block-zstd-delta.bin": lambda: sealed(Codec.ZSTD_DELTA, Kind.VOLUME, 2, TEXT + filler("new", 40)).data,
    "block-index.bin": lambda: sealed(Codec.STORED, Kind.INDEX, 1, encode_node(VOLUME_LEAF)).data,
    "node-volume-leaf.bin": lambda: encode_node(VOLUME_LEAF),
    "node-volume-inner.bin": lambda: encode_node(VOLUME_INNER),
    "node-object-leaf.bin": lambda: encode_node(OBJECT_LEAF),
    "node-object-inner.bin": lambda: encode_node(OBJECT_INNER),
    "mac-input-point.bin": point_mac_bytes,
    "mac-input-object.bin": object_mac_bytes,
    "tenant-keys.pb": lambda: SECRETS.to_message().SerializeToString(deterministic=True),
    "wrapped-secret.pb": lambda: wrap_secret(MASTER, b"a secret", "tenant 1", NONCE).SerializeToString(
        deterministic=True
    ),
    "layout.pb": layout_message,
    "point-record.pb": point_record,
    "point-record-forgotten.pb": forgotten_point,
    "object-record.pb": object_record,
    "vm-record.pb": vm_record,
    "vm-record-lifecycle.pb": vm_record_lifecycle,
    "point-record-lifecycle.pb": point_record_lifecycle,
    "session-record-lifecycle.pb": session_record_lifecycle,
    "object-record-files.pb": object_record_files,
    "session-record.pb": session_record,
    "audit-export.jsonl": audit_export,
    "audit-head-input.bin": audit_head_input,
    "file-set.bin": file_set,
    "overlay.json": lambda: OVERLAY.to_json().encode(),
    "overlay-map-page.bin": overlay_map_page,
}
