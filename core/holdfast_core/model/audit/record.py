"""One record of the audit log, and the line of JSON that it is kept as (ADR 0079, docs/formats.md).

The line is what is hashed, kept, exported and verified: nothing is ever serialised a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ACCESS_TEXT_CHARS_MAX

OK: Final = "OK"
REPEATED: Final = "REPEATED"
ROTATE_AUDIT_ACTION: Final = "keys.rotate-audit"
"""Action of the record that introduces a new key for heads, under a head of an older key: its details name `key_id` and
`public_key` (hexadecimal)."""

_TEXTS: Final = ("principal", "tenant", "action", "resource", "outcome", "request_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One state operation, allowed or denied.

    Attributes:
        sequence: its place in the log; the first is 0.
        time_unix_ms: when it was appended, milliseconds; never before the previous record's.
        principal: who asked; empty for counts of unauthenticated calls.
        tenant: name of the tenant, empty for the cluster itself.
        action: the permission that the call needs.
        resource: what it is about, e.g. `vm/web-1`.
        outcome: `OK`, `REPEATED` where an earlier call had done it already, or the name of an error code.
        request_id: as in the services' logs.
        entry_id: 16 hexadecimal digits that make the line unique.
        details: small facts, text to text.
    """

    sequence: int
    time_unix_ms: int
    principal: str
    tenant: str
    action: str
    resource: str
    outcome: str
    request_id: str
    entry_id: str
    details: Mapping[str, str] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """Return the record as one line of JSON in ASCII, without the line's end; texts are cut to their bound."""
        fields: dict[str, Any] = {name: getattr(self, name)[:ACCESS_TEXT_CHARS_MAX] for name in _TEXTS}
        fields["sequence"] = self.sequence
        fields["time_unix_ms"] = self.time_unix_ms
        fields["id"] = self.entry_id
        if self.details:
            fields["details"] = {
                key[:ACCESS_TEXT_CHARS_MAX]: value[:ACCESS_TEXT_CHARS_MAX] for key, value in self.details.items()
            }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")

    @classmethod
    def from_line(cls, line: bytes) -> AuditRecord:
        """Parse a line.

        Raises:
            HoldfastError: CORRUPT if it is no record.
        """
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _malformed("it is no JSON") from error
        if not isinstance(fields, dict):
            raise _malformed("it is no object")
        details = fields.get("details", {})
        numbers = (fields.get("sequence"), fields.get("time_unix_ms"))
        texts = [fields.get(name) for name in (*_TEXTS, "id")]
        if (
            not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
            or not all(isinstance(text, str) for text in texts)
            or not isinstance(details, dict)
            or not all(isinstance(value, str) for value in details.values())
        ):
            raise _malformed("a field is missing or of another kind")
        return cls(
            sequence=fields["sequence"],
            time_unix_ms=fields["time_unix_ms"],
            principal=fields["principal"],
            tenant=fields["tenant"],
            action=fields["action"],
            resource=fields["resource"],
            outcome=fields["outcome"],
            request_id=fields["request_id"],
            entry_id=fields["id"],
            details=details,
        )


def _malformed(why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.CORRUPT, f"this is no line of an audit log: {why}")
