"""The call that is being served: who makes it, in which tenant, what it may do, and what the audit log will say of it.

The guard makes it before the handler runs; the handler finds it with `current_call` and must say what it is about, with
`require` or `filtered`. An answer of a handler that did neither never leaves (ADR 0074).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.tenant import Tenant
from holdfast_core.model.errors import ErrorCode, HoldfastError

_CURRENT: contextvars.ContextVar[Call] = contextvars.ContextVar("holdfast_call")


@dataclass(slots=True, kw_only=True)
class Call:
    """One call that was let in. Belongs to one task.

    Attributes:
        principal: who makes it.
        entry: what the audit log will say of it.
        allows: whether the principal holds a permission on a resource, in this call's tenant; permissions of the
            cluster count from bindings for all tenants alone.
        allows_everywhere: as `allows`, counting bindings for all tenants alone.
        permission: what the call's rule asks for.
        otherwise: the rule's second permission, empty for none.
        tenant: the tenant; None where the call is about the cluster.
        checked: whether the handler has said what the call is about.
    """

    principal: str
    entry: Entry
    allows: Callable[[str, str], bool]
    permission: str
    otherwise: str = ""
    tenant: Tenant | None = None
    checked: bool = False
    allows_everywhere: Callable[[str, str], bool] = lambda permission, resource: False

    def require(self, resource: str, *, otherwise: bool = False, permission: str = "") -> None:
        """Return if the principal may do this with `resource`; the audit log then names it.

        Args:
            resource: e.g. `vm/web-1`.
            otherwise: whether the rule's second permission is the one that counts.
            permission: another permission than the rule's, where the rule leaves it to the handler.

        Raises:
            HoldfastError: DENIED.
        """
        wanted = permission or (self.otherwise if otherwise else self.permission)
        self.entry.action, self.entry.resource, self.checked = wanted, resource, True
        if not self.allows(wanted, resource):
            raise HoldfastError(
                ErrorCode.DENIED,
                f"{self.principal} does not hold {wanted} on {resource}; ask an administrator for a role that has it",
                facts={"permission": wanted, "resource": resource},
            )

    def filtered(self, resource: str = "") -> None:
        """Say that the handler leaves out by itself what `allows` refuses; for listings."""
        self.entry.resource, self.checked = resource, True

    def may(self, permission: str, resource: str) -> bool:
        """Return whether the principal holds a permission on a resource; nothing is recorded of the question."""
        return self.allows(permission, resource)

    @property
    def of(self) -> Tenant:
        """The tenant's parts. Raises INTERNAL for a call that is about the cluster."""
        if self.tenant is None:
            raise HoldfastError(ErrorCode.INTERNAL, "this call is about the cluster and has no tenant")
        return self.tenant


def current_call() -> Call:
    """Return the call that this task serves.

    Raises:
        RuntimeError: outside of one.
    """
    try:
        return _CURRENT.get()
    except LookupError:
        raise RuntimeError("no call is being served here") from None


@contextmanager
def serving(call: Call) -> Iterator[None]:
    """Make `call` the current one of this task."""
    token = _CURRENT.set(call)
    try:
        yield
    finally:
        _CURRENT.reset(token)
