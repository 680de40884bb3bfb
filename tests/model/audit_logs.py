"""Small audit logs, made as a coordinator makes them: batches of records, a signed head after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast_core.model.audit.export import export_lines
from holdfast_core.model.audit.heads import HeadSigner
from holdfast_core.model.audit.merkle import Frontier, Subtree, leaf_hash, tree_root
from holdfast_core.model.audit.record import OK, ROTATE_AUDIT_ACTION, AuditRecord
from holdfast_proto.v1.audit_pb2 import AuditBatch, AuditKey, ExportAuditRecordsResponse, SignedHead

CLUSTER_ID = "c1" * 16
START_UNIX_MS = 1_800_000_000_000


def signer(key_id: str, seed: int = 0, cluster_id: str = CLUSTER_ID) -> HeadSigner:
    """A signer whose key depends on `key_id` and `seed` alone."""
    return HeadSigner(key_id, leaf_hash(f"{key_id} {seed}".encode()), cluster_id)


def record(place: int, **changes: object) -> AuditRecord:
    """A record with its place in most of its fields."""
    fields: dict[str, object] = {
        "sequence": place,
        "time_unix_ms": START_UNIX_MS + place,
        "principal": f"agent-{place % 3}",
        "tenant": "default",
        "action": "snapshot.create",
        "resource": f"vm/web-{place % 2}",
        "outcome": OK,
        "request_id": f"{place:016x}",
        "entry_id": f"{place + 1000:016x}",
        "details": {"step": "begin"},
    }
    return AuditRecord(**{**fields, **changes})  # type: ignore[arg-type]  # as the fields above


@dataclass(slots=True)
class Log:
    """A log that grows by batches.

    Attributes:
        signer: whose key signs the next head.
        keys: all keys so far.
    """

    signer: HeadSigner = field(default_factory=lambda: signer("audit-1"))
    batches: list[AuditBatch] = field(default_factory=list)
    frontiers: list[Frontier] = field(default_factory=lambda: [Frontier()])
    keys: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Records."""
        return self.frontiers[-1].size

    @property
    def lines(self) -> list[bytes]:
        """All records' lines."""
        return [line for batch in self.batches for line in batch.lines]

    def append(self, count: int = 1, **changes: object) -> None:
        """Add a batch of records."""
        first, before = self.size, self.frontiers[-1]
        lines = [record(first + at, **changes).to_line() for at in range(count)]
        tree = before.extended(map(leaf_hash, lines))
        head = self.signer.sign(size=tree.size, root=tree.root, time_unix_ms=START_UNIX_MS + tree.size)
        self.keys[self.signer.key_id] = self.signer.public_key
        self.batches.append(AuditBatch(first=first, lines=lines, head=head))
        self.frontiers.append(tree)

    def rotate(self, newer: HeadSigner) -> None:
        """Introduce a key under a head of the present one; it signs from the next batch on."""
        details = {"key_id": newer.key_id, "public_key": newer.public_key.hex()}
        self.append(action=ROTATE_AUDIT_ACTION, resource="cluster", tenant="", details=details)
        self.signer = newer
        self.keys[newer.key_id] = newer.public_key

    def head(self, size: int) -> SignedHead:
        """The head over the first so many records."""
        return next(batch.head for batch in self.batches if batch.head.size == size)

    def subtree(self) -> Subtree:
        """Roots of subtrees, from the lines."""
        hashes = [leaf_hash(line) for line in self.lines]
        return lambda start, end: Frontier().extended(hashes[start:end]).root

    def root(self, size: int) -> bytes:
        """Root of the tree over the first so many records, batch or not."""
        return tree_root(0, size, self.subtree())

    def messages(self, at: int = 0) -> list[ExportAuditRecordsResponse]:
        """What a coordinator streams for an export from batch `at` on."""
        keys = [AuditKey(key_id=key_id, public_key=key) for key_id, key in self.keys.items()]
        opening = ExportAuditRecordsResponse(cluster_id=CLUSTER_ID, keys=keys, frontier=self.frontiers[at].hashes)
        return [opening, *(ExportAuditRecordsResponse(batches=[batch]) for batch in self.batches[at:])]

    def export(self, at: int = 0) -> list[bytes]:
        """The lines of an export from batch `at` on."""
        return list(export_lines(self.messages(at)))


def grown(sizes: Sequence[int] = (3, 1, 4, 2)) -> Log:
    """A log of batches of these sizes, one key."""
    log = Log()
    for size in sizes:
        log.append(size)
    return log


def rotated() -> Log:
    """A log of 3 records, one more that introduces a second key, 4 under that one, one for a third key, and 2."""
    log = Log()
    log.append(3)
    log.rotate(signer("audit-2"))
    log.append(4)
    log.rotate(signer("audit-3"))
    log.append(2)
    return log
