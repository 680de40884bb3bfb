"""Lets every call in as one principal that may do everything. The shape of the guard before it decides anything."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import Call, serving
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.tenants import Tenants
from holdfast_core.runtime.credentials import TENANT_KEY
from holdfast_core.runtime.requests import current_request_id
from holdfast_core.runtime.rules import rule_of

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_DEFAULT: str = "default"


class OpenGuard:
    """Lets every call in."""

    def __init__(self, tenants: Tenants, random_bytes: Callable[[int], bytes]) -> None:
        self._tenants = tenants
        self._random_bytes = random_bytes

    @asynccontextmanager
    async def enter(self, method: str, context: Context) -> AsyncIterator[None]:
        """Serve the call in the tenant that it names, or in the default one."""
        name = next((str(v) for k, v in context.invocation_metadata() or () if k == TENANT_KEY), _DEFAULT)
        rule = rule_of(method)
        permission = rule.permission if rule is not None else ""
        entry = Entry(
            principal="admin",
            tenant=name,
            action=permission,
            request_id=current_request_id(),
            entry_id=self._random_bytes(8).hex(),
        )
        call = Call(
            principal="admin",
            entry=entry,
            allows=lambda permission, resource: True,
            permission=permission,
            otherwise=rule.permission_otherwise if rule is not None else "",
            tenant=await self._tenants.named(name),
        )
        with serving(call):
            yield
