"""What the audit log will say of one call: made when the call is let in, filled in while it is served, written once.

Belongs to one task. `Ledger` writes it, in the transaction that it describes or alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast_core.model.audit.record import OK, REPEATED, AuditRecord


@dataclass(slots=True, kw_only=True)
class Entry:
    """One state operation.

    Attributes:
        principal: who asks.
        tenant: name of the tenant, "" for the cluster itself.
        action: the permission that the call needs, e.g. "backup.create".
        resource: what it is about, e.g. "vm/web-1"; set once it is known and well-formed.
        request_id: as in the logs.
        entry_id: 16 hexadecimal digits drawn for this call alone; makes every line unique.
        details: small facts, e.g. {"point": "bkp-…"}; no secrets.
        outcome: "OK", "REPEATED", or the name of an ErrorCode.
        written: whether the log has it.
    """

    principal: str
    tenant: str
    action: str
    request_id: str
    entry_id: str
    resource: str = ""
    details: dict[str, str] = field(default_factory=dict)
    outcome: str = OK
    written: bool = False

    def repeated(self) -> None:
        """Say that the call found what an earlier one had made and recorded."""
        self.outcome = REPEATED

    def record(self, sequence: int, time_unix_ms: int) -> AuditRecord:
        """Return the record at its place in the log."""
        return AuditRecord(
            sequence=sequence,
            time_unix_ms=time_unix_ms,
            principal=self.principal,
            tenant=self.tenant,
            action=self.action,
            resource=self.resource,
            outcome=self.outcome,
            request_id=self.request_id,
            entry_id=self.entry_id,
            details=dict(self.details),
        )
