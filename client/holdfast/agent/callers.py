"""Who may call an agent: over a Unix socket whoever may open it, over TLS the principals that it was told of."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_NAMES: Final = "x509_subject_alternative_name"


class AllowedCallers:
    """Lets in callers whose certificate names one of some principals. See `holdfast_core.runtime.calls.Guard`."""

    def __init__(self, principals: Collection[str]) -> None:
        """Take principals as certificates name them, e.g. "holdfast://principal/orchestrator"."""
        self._principals = frozenset(principals)

    def enter(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """Check who calls.

        Raises:
            HoldfastError: DENIED.
        """
        names = {name.decode(errors="replace") for name in context.auth_context().get(_NAMES, ())}
        if not names & self._principals:
            shown = ", ".join(sorted(names)) or "nobody"
            raise HoldfastError(ErrorCode.DENIED, f"this agent does not serve {shown}; name it with --allow")
        return nullcontext()
