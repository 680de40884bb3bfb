"""The guard before every handler: who calls, in which tenant, whether they may, and the record of what came of it.

The order is fixed. A call without a rule is refused (ADR 0074). Then the peer: credentials and keys cross no wire in
plain text. Then who it is; strangers are counted, not recorded. Then the tenant. Then a coarse look: who holds the
permission on nothing at all is refused before anything is looked up. Only then the handler runs, and it must say what
it is about (`Call.require`, `Call.filtered`), or its answer does not leave. Last comes the record, and without it no
answer leaves either, unless the handler's transaction has written it already.

All that the guard itself asks is answered from copies; what it waits for is the record alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import Call, serving
from holdfast_coordinator.access.identity import Identified, Identities, Shown
from holdfast_coordinator.access.refusals import RefusalCounts
from holdfast_coordinator.access.view import AccessView
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.grants import check_keys_may_leave
from holdfast_coordinator.tenant import Tenant
from holdfast_core.model.access.patterns import ANY
from holdfast_core.model.access.permissions import CLUSTER_PERMISSIONS, SELF_READ, SESSION_OWN
from holdfast_core.model.access.policy import Rights
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_name
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.credentials import TENANT_KEY
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.requests import current_request_id
from holdfast_core.runtime.rules import rule_of
from holdfast_proto.v1.rules_pb2 import Rule

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_DEFAULT: Final = "default"
# How long a call that goes on (a watch) may rely on a credential without looking at it again.
_TRUSTED_S: Final = 1.0


class AccessGuard:
    """Lets in who may come in, and nobody else."""

    def __init__(
        self,
        *,
        view: AccessView,
        identities: Identities,
        tenant: Callable[[str], Awaitable[Tenant]],
        ledger: Ledger,
        refusals: RefusalCounts,
        encrypted: bool,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        """Bind to what it asks.

        Args:
            view: the copy that calls are let in from.
            identities: who tells who calls.
            tenant: gives the parts of a tenant by its name, or raises NOT_FOUND.
            ledger: where calls are recorded.
            refusals: where calls without a good credential are counted.
            encrypted: whether the service is reached over TLS alone.
            clock, random_bytes: as everywhere.
        """
        self._view = view
        self._identities = identities
        self._tenant = tenant
        self._ledger = ledger
        self._refusals = refusals
        self._encrypted = encrypted
        self._clock = clock
        self._random_bytes = random_bytes
        self._log = get_log("coordinator")

    @asynccontextmanager
    async def enter(self, method: str, context: Context) -> AsyncIterator[None]:
        """Serve one call, or refuse it.

        Raises:
            HoldfastError: UNAUTHENTICATED, DENIED, NOT_FOUND and INVALID_ARGUMENT as the module says; INTERNAL for a
                call without a rule and for a handler that did not say what it was about; what the ledger raises.
        """
        rule = rule_of(method)
        if rule is None or not rule.permission:
            raise HoldfastError(ErrorCode.INTERNAL, f"{method} has no rule that says who may call it")
        shown = Shown.of(context)
        who = self._identified(shown, context.peer())
        entry = Entry(
            principal=who.principal,
            tenant="",
            action=rule.permission,
            request_id=current_request_id(),
            entry_id=self._random_bytes(8).hex(),
        )
        try:
            named = _texts(context).get(TENANT_KEY)
            call = await self._admitted(rule, who, entry, named, shown)
            with serving(call):
                yield
            if not call.checked:
                raise HoldfastError(ErrorCode.INTERNAL, f"the handler of {method} did not say what it is about")
        except HoldfastError as error:
            entry.outcome = error.code.name
            await self._record_failure(rule, entry, error)
            raise
        except Exception as error:
            entry.outcome = ErrorCode.INTERNAL.name
            await self._record_fault(rule, entry, error)
            raise
        if rule.recorded:
            await self._ledger.record(entry)

    def _identified(self, shown: Shown, peer: str) -> Identified:
        try:
            check_keys_may_leave(peer=peer, encrypted=self._encrypted)
        except HoldfastError:
            self._refusals.count("plaintext")
            raise
        try:
            return self._identities.of(shown)
        except HoldfastError as error:
            self._refusals.count(error.facts.get("reason", "unknown"))
            raise

    async def _admitted(self, rule: Rule, who: Identified, entry: Entry, named: str | None, shown: Shown) -> Call:
        """Return the call of a principal that holds the permission on something."""
        rights = self._view.policy.rights_of(who.principal, who.also)
        if rule.permission not in CLUSTER_PERMISSIONS:
            if named is not None:
                # Noted before it is judged: the log is to say which tenant a denied call was after.
                entry.tenant = check_name(named, "tenant name")
            entry.tenant = self._tenant_of(rule, rights, who.principal, named)
        wanted = [rule.permission, rule.permission_otherwise, SESSION_OWN if rule.sessions_too else ""]
        if not any(rights.somewhere(permission, entry.tenant) for permission in wanted if permission):
            raise _denied(who.principal, rule.permission, entry.tenant)
        allowance = _Allowance(self._view, self._identities, self._clock, shown, who)
        return Call(
            principal=who.principal,
            entry=entry,
            allows=partial(allowance.holds, entry.tenant),
            allows_everywhere=partial(allowance.holds, ""),
            permission=rule.permission,
            otherwise=rule.permission_otherwise,
            # Who one is can be asked also by who is bound to a tenant that is not there.
            tenant=await self._tenant(entry.tenant) if entry.tenant and rule.permission != SELF_READ else None,
        )

    def _tenant_of(self, rule: Rule, rights: Rights, principal: str, named: str | None) -> str:
        """Return the name of the call's tenant; "" where one is told who it is and there is none."""
        bound = rights.tenants
        if named is not None:
            if named not in bound and ANY not in bound:
                if rule.permission == SELF_READ:
                    return ""
                # The same words whether there is such a tenant or not.
                raise _denied(principal, rule.permission, named)
            return named
        if ANY in bound or _DEFAULT in bound:
            return _DEFAULT
        if len(bound) == 1:
            return next(iter(bound))
        if rule.permission == SELF_READ:
            return ""
        if not bound:
            raise _denied(principal, rule.permission, "")
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"which tenant? {principal} may work in {', '.join(sorted(bound))}; give --tenant or set HOLDFAST_TENANT",
        )

    async def _record_failure(self, rule: Rule, entry: Entry, error: HoldfastError) -> None:
        if not rule.recorded and error.code is not ErrorCode.DENIED:
            return
        try:
            await self._ledger.record(entry)
        except HoldfastError as unrecorded:
            if error.code is not ErrorCode.UNREACHABLE:
                raise unrecorded from error
            # The store is away, which is what the caller is told anyway.
            self._log.warning("not recorded", action=entry.action, message=unrecorded.message)

    async def _record_fault(self, rule: Rule, entry: Entry, fault: Exception) -> None:
        if not rule.recorded:
            return
        try:
            await self._ledger.record(entry)
        except HoldfastError as unrecorded:
            # The fault goes on to the log with its traceback, and an INTERNAL tells the caller nothing of any state.
            self._log.warning(
                "not recorded", action=entry.action, message=unrecorded.message, fault=type(fault).__name__
            )


class _Allowance:
    """What one call's principal may do, as of now: also a call that goes on for days ends with its rights."""

    def __init__(self, view: AccessView, identities: Identities, clock: Clock, shown: Shown, who: Identified) -> None:
        self._view = view
        self._identities = identities
        self._clock = clock
        self._shown = shown
        self._who = who
        self._good = True
        self._version = view.version
        self._seen_s = clock.monotonic_s()

    def holds(self, tenant: str, permission: str, resource: str) -> bool:
        """Return whether the permission is held on the resource; "" asks whether it is held on any.

        With "" for the tenant, bindings for all tenants count alone.
        """
        if not self._still_good():
            return False
        rights = self._view.policy.rights_of(self._who.principal, self._who.also)
        if not resource:
            return rights.somewhere(permission, tenant)
        return rights.allows(permission, tenant, resource)

    def _still_good(self) -> bool:
        """Return whether the credential still proves the principal."""
        now_s = self._clock.monotonic_s()
        if self._version != self._view.version or now_s - self._seen_s > _TRUSTED_S:
            self._version, self._seen_s = self._view.version, now_s
            try:
                self._good = self._identities.of(self._shown) == self._who
            except HoldfastError:
                self._good = False
        return self._good


def _texts(context: Context) -> Mapping[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _denied(principal: str, permission: str, tenant: str) -> HoldfastError:
    where = f" in tenant {tenant}" if tenant else ""
    return HoldfastError(
        ErrorCode.DENIED,
        f"{principal} does not hold {permission}{where}; ask an administrator for a role that has it",
        facts={"permission": permission},
    )
