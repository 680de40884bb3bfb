"""Who makes a call: the principal of an API token, or else the one that the client's certificate names (ADR 0075).

A token wins over a certificate, and one that is not good is refused even beside a good certificate: whoever sends a
token means it. A revoked certificate is refused even beside a good token: its key is in other hands. Names of machines
are no principals: neither common names nor DNS names are looked at.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import grpc.aio

from holdfast_coordinator.access.certificates import Certificates
from holdfast_coordinator.access.view import AccessView
from holdfast_core.model.access.patterns import ANY
from holdfast_core.model.access.policy import BindingRule
from holdfast_core.model.access.tokens import proves
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.credentials import AUTHORIZATION_KEY, Credential, parse_token
from holdfast_core.runtime.logs import get_log

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

CERTIFICATE: Final = "certificate"
TOKEN: Final = "token"

ADMIN_PRINCIPAL: Final = "admin"
NODE_PRINCIPAL: Final = "node"
COORDINATOR_PRINCIPAL: Final = "coordinator"
RESERVED_PRINCIPALS: Final = frozenset({ADMIN_PRINCIPAL, NODE_PRINCIPAL, COORDINATOR_PRINCIPAL})
"""Names of what is not in the policy; a token that is made cannot stand for one, or the audit log would be in doubt."""

_SCHEME: Final = "bearer"
_PEM_KEY: Final = "x509_pem_cert"
_HOW: Final = "give --token-file or set HOLDFAST_TOKEN_FILE (`holdfast up` writes DIR/admin.token)"


@dataclass(frozen=True, slots=True)
class StaticToken:
    """A token that the operator gave the coordinator by a file. The policy neither makes nor takes what it holds.

    Attributes:
        principal: whom it stands for.
        role: the role that it holds in all tenants and in the cluster.
        source: its text, or the file that holds it, which is read again when it changes.
        resource: the pattern of what it holds the role on.
    """

    principal: str
    role: str
    source: Credential
    resource: str = ANY

    @property
    def binding(self) -> BindingRule:
        """What it holds, as a policy would say it."""
        return BindingRule(self.principal, self.role, ANY, self.resource)


def admin_token(source: Credential) -> StaticToken:
    """Return the static token of an administrator."""
    return StaticToken(ADMIN_PRINCIPAL, "admin", source)


def node_token(source: Credential) -> StaticToken:
    """Return the static token that storage nodes share."""
    return StaticToken(NODE_PRINCIPAL, "node", source, "node/*")


@dataclass(frozen=True, slots=True, repr=False)
class Shown:
    """What a caller shows of itself, taken out of the call: gRPC's context must not be touched once a call has ended.

    Attributes:
        authorizations: values of the metadata key `authorization`; there should be one at most.
        pem: the client's certificate, empty without TLS.
    """

    authorizations: tuple[str | bytes, ...] = ()
    pem: bytes = b""

    @classmethod
    def of(cls, context: Context) -> Shown:
        """Return what came with a call that is being served."""
        metadata = context.invocation_metadata() or ()
        return cls(
            tuple(value for key, value in metadata if key == AUTHORIZATION_KEY),
            next(iter(context.auth_context().get(_PEM_KEY, ())), b""),
        )


@dataclass(frozen=True, slots=True)
class Identified:
    """Who makes a call, as it was proven.

    Attributes:
        principal: who.
        proof: "token" or "certificate".
        also: bindings that come with the proof and not from the policy.
    """

    principal: str
    proof: str
    also: tuple[BindingRule, ...] = ()


class Identities:
    """Tells who makes calls, from copies: it never waits."""

    def __init__(self, view: AccessView, *, static: Sequence[StaticToken], clock: Clock) -> None:
        """Bind to what is known; `static` are looked at before the store's tokens."""
        self._view = view
        self._static = tuple(static)
        self._clock = clock
        self._certificates = Certificates()
        self._log = get_log("coordinator")
        self._unreadable: set[str] = set()

    def of(self, shown: Shown) -> Identified:
        """Return who makes the call.

        Raises:
            HoldfastError: UNAUTHENTICATED; the fact "reason" is "absent", "malformed", "unknown", "expired",
                "revoked" or "certificate".
        """
        certificate = self._certificates.read(shown.pem) if shown.pem else None
        if certificate is not None and self._view.is_revoked(certificate.fingerprint):
            _refuse("revoked", "the client's certificate was revoked; ask an administrator for another")
        if shown.authorizations:
            return self._by_token(shown.authorizations)
        if certificate is None:
            _refuse("absent", f"no credential came with the call; {_HOW}")
        if not certificate.principal:
            _refuse("certificate", f"the client's certificate names no principal: {certificate.why_nobody}; or {_HOW}")
        if not certificate.begins_unix_ms <= self._clock.now_unix_ms() <= certificate.ends_unix_ms:
            _refuse("expired", "the client's certificate is not valid at this time; renew it, and check the clocks")
        return Identified(certificate.principal, CERTIFICATE)

    def _by_token(self, authorizations: Sequence[str | bytes]) -> Identified:
        token_id, secret, text = _presented(authorizations)
        for static in self._static:
            if hmac.compare_digest(text.encode(), self._text_of(static).encode()):
                return Identified(static.principal, TOKEN, (static.binding,))
        record = self._view.token(token_id)
        if record is None or not proves(secret, record.secret_hash):
            _refuse("unknown", "the token that came with the call is not known; it may have been revoked or replaced")
        if self._clock.now_unix_ms() >= record.expires_unix_ms:
            _refuse("expired", "the token that came with the call has ended; ask an administrator for another")
        return Identified(record.principal, TOKEN)

    def _text_of(self, static: StaticToken) -> str:
        """Return the text, or one that no token has while the file is away: what was taken away holds no longer."""
        try:
            static.source.metadata()
        except HoldfastError as error:
            if static.principal not in self._unreadable:
                self._unreadable.add(static.principal)
                self._log.error("static token", principal=static.principal, message=error.message)
            return ""
        self._unreadable.discard(static.principal)
        return static.source.token


def _presented(authorizations: Sequence[str | bytes]) -> tuple[str, bytes, str]:
    """Return id, secret and text of the token that came; nothing of it is in the error."""
    value = authorizations[0]
    scheme, _, text = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if len(authorizations) != 1 or scheme.lower() != _SCHEME:
        _refuse("malformed", "the call's authorization is not one `Bearer TOKEN`")
    try:
        return *parse_token(text), text
    except HoldfastError as error:
        _refuse("malformed", error.message)


def _refuse(reason: str, message: str) -> NoReturn:
    raise HoldfastError(ErrorCode.UNAUTHENTICATED, message, facts={"reason": reason})
