"""The policy: roles as sets of permissions, bindings of principals to roles within a tenant and a pattern of resources.

It is one JSON document, read whole or refused whole (ADR 0076; docs/security.md shows one). What no binding allows is
denied: there are no deny rules, no inheritance and no conditions. The roles that are built in need no definition and
cannot be given another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NoReturn

from holdfast_core.model.access.patterns import ANY, matches
from holdfast_core.model.access.permissions import (
    ADMIN_PERMISSIONS,
    BUILT_IN_ROLES,
    CLUSTER_PERMISSIONS,
    PERMISSIONS,
    SELF_READ,
    SESSION_OWN,
    SESSION_PERMISSIONS,
)
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    ACCESS_TEXT_CHARS_MAX,
    POLICY_BINDINGS_MAX,
    POLICY_BYTES_MAX,
    POLICY_ROLES_MAX,
)
from holdfast_core.model.names import check_name

FORMAT: Final = 1

_FIELDS: Final = frozenset({"format", "roles", "bindings"})
_BINDING_FIELDS: Final = ("principal", "role", "tenant", "resource")
_RIGHTS_KEPT_MAX: Final = 4096

# Printable ASCII without blanks and quotes; a principal that a pattern of the policy could be mistaken for has no `*`.
_PRINCIPAL = re.compile(r"[A-Za-z0-9](?:[!#-&(-)+-\[\]-~])*\Z", re.ASCII)
_PRINCIPAL_PATTERN = re.compile(r"[A-Za-z0-9*](?:[!#-&(-\[\]-~])*\Z", re.ASCII)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:", re.ASCII)
_RESOURCE_PATTERN = re.compile(r"[A-Za-z0-9._@+:/*-]+\Z", re.ASCII)


def check_principal(text: str) -> str:
    """Return `text` if it may name a principal: a name without slash, or a URI.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty, too long, or holds blanks, quotes, `*` or other than ASCII.
    """
    if len(text) > ACCESS_TEXT_CHARS_MAX or not _PRINCIPAL.match(text) or ("/" in text and not _URI.match(text)):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{text[:ACCESS_TEXT_CHARS_MAX]!r} cannot name a principal; take a name without slash or a URI, of at most "
            f"{ACCESS_TEXT_CHARS_MAX} printable ASCII characters without blanks, quotes and *",
        )
    return text


@dataclass(frozen=True, slots=True)
class BindingRule:
    """A principal holds a role within a tenant, on what a pattern names.

    Attributes:
        principal: the principal, or a pattern of principals.
        role: a role's name.
        tenant: a tenant's name, or `*` for all and for the cluster itself.
        resource: a pattern of resources.
    """

    principal: str
    role: str
    tenant: str
    resource: str


@dataclass(frozen=True, slots=True)
class Rights:
    """What one principal holds under one policy.

    Attributes:
        bindings: those that name it.
    """

    bindings: tuple[BindingRule, ...]
    _permissions: tuple[frozenset[str], ...] = field(repr=False)

    def allows(self, permission: str, tenant: str, resource: str) -> bool:
        """Return whether it holds `permission` on `resource` in `tenant`, "" for the cluster itself."""
        return self._holds(permission, tenant, lambda pattern: matches(pattern, resource))

    def somewhere(self, permission: str, tenant: str) -> bool:
        """Return whether it holds `permission` on any resource at all in `tenant`."""
        return self._holds(permission, tenant, lambda pattern: True)

    @property
    def tenants(self) -> frozenset[str]:
        """Tenants that its bindings name; may hold `*`."""
        return frozenset(binding.tenant for binding in self.bindings)

    def _holds(self, permission: str, tenant: str, covers: Callable[[str], bool]) -> bool:
        if permission == SELF_READ:
            return True
        wanted = SESSION_PERMISSIONS if permission == SESSION_OWN else {permission}
        scopes = (ANY,) if permission in CLUSTER_PERMISSIONS else (ANY, tenant)
        return any(
            not wanted.isdisjoint(held) and binding.tenant in scopes and covers(binding.resource)
            for binding, held in zip(self.bindings, self._permissions, strict=True)
        )


@dataclass(frozen=True)
class Policy:
    """One policy. Immutable; a change is another policy.

    Attributes:
        roles: permissions by name of the roles that the document defines, without those that are built in.
        bindings: in the document's order.
    """

    roles: Mapping[str, frozenset[str]]
    bindings: tuple[BindingRule, ...]

    @classmethod
    def parse(cls, document: str) -> Policy:
        """Read a document.

        Raises:
            HoldfastError: INVALID_ARGUMENT naming the JSON path of the first mistake, also as the fact "path".
        """
        size_bytes = len(document.encode("utf-8", "surrogatepass"))
        if size_bytes > POLICY_BYTES_MAX:
            _refuse("$", f"the document has {size_bytes} bytes; {POLICY_BYTES_MAX} are allowed")
        top = _object(_loaded(document), "$", _FIELDS)
        stated = top.get("format")
        if type(stated) is not int or stated != FORMAT:
            _refuse("$.format", f"it must be {FORMAT}, the one format that this version reads")
        roles = _roles(top.get("roles", {}))
        return cls(MappingProxyType(roles), _bindings(top.get("bindings"), roles))

    def to_document(self) -> str:
        """Return the document, which `parse` reads back."""
        return json.dumps(
            {
                "format": FORMAT,
                "roles": {name: sorted(permissions) for name, permissions in sorted(self.roles.items())},
                "bindings": [{name: getattr(binding, name) for name in _BINDING_FIELDS} for binding in self.bindings],
            },
            indent=1,
        )

    def bound(self, binding: BindingRule) -> Policy:
        """Return the policy with this binding, which it may have already."""
        return self if binding in self.bindings else replace(self, bindings=(*self.bindings, binding))

    def unbound(self, binding: BindingRule) -> Policy:
        """Return the policy without this binding, which it may not have."""
        return replace(self, bindings=tuple(each for each in self.bindings if each != binding))

    def permissions_of(self, role: str) -> frozenset[str]:
        """Return what a role holds; nothing for one that nobody defined."""
        return BUILT_IN_ROLES.get(role) or self.roles.get(role, frozenset())

    def bindings_of(self, principal: str) -> tuple[BindingRule, ...]:
        """Return the bindings that name a principal, in the document's order."""
        exact, patterns = self._places
        places = [
            *exact.get(principal, ()),
            *(at for at in patterns if matches(self.bindings[at].principal, principal)),
        ]
        return tuple(self.bindings[at] for at in sorted(places))

    def rights_of(self, principal: str, also: Sequence[BindingRule] = ()) -> Rights:
        """Return what a principal holds; `also` are bindings that it has besides the document's."""
        key = (principal, tuple(also))
        rights = self._rights.get(key)
        if rights is None:
            bindings = (*also, *self.bindings_of(principal))
            rights = Rights(bindings, tuple(self.permissions_of(binding.role) for binding in bindings))
            if len(self._rights) >= _RIGHTS_KEPT_MAX:
                self._rights.clear()
            self._rights[key] = rights
        return rights

    def allows(self, principal: str, permission: str, tenant: str, resource: str) -> bool:
        """Return whether a principal holds `permission` on `resource` in `tenant`, "" for the cluster itself."""
        return self.rights_of(principal).allows(permission, tenant, resource)

    def somewhere(self, principal: str, permission: str, tenant: str) -> bool:
        """Return whether a principal holds `permission` on any resource at all in `tenant`."""
        return self.rights_of(principal).somewhere(permission, tenant)

    def tenants_of(self, principal: str) -> frozenset[str]:
        """Return the tenants that a principal's bindings name; may hold `*`."""
        return self.rights_of(principal).tenants

    @cached_property
    def _places(self) -> tuple[Mapping[str, Sequence[int]], Sequence[int]]:
        """Places of bindings by principal, and of those that bind a pattern."""
        exact: dict[str, list[int]] = {}
        patterns: list[int] = []
        for at, binding in enumerate(self.bindings):
            if ANY in binding.principal:
                patterns.append(at)
            else:
                exact.setdefault(binding.principal, []).append(at)
        return exact, patterns

    @cached_property
    def _rights(self) -> dict[tuple[str, tuple[BindingRule, ...]], Rights]:
        return {}


DEFAULT_POLICY: Final = Policy(
    MappingProxyType({}),
    (
        BindingRule("spiffe://holdfast/admin/*", "admin", ANY, ANY),
        BindingRule("spiffe://holdfast/node/*", "node", ANY, "node/*"),
    ),
)
"""What a cluster begins with: the certificates that `holdfast pki` makes for administrators and nodes."""
DEFAULT_DOCUMENT: Final = DEFAULT_POLICY.to_document()


def _loaded(document: str) -> Any:
    try:
        return json.loads(document, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        _refuse("$", "it is nested too deeply")
    except ValueError as error:
        _refuse("$", f"it is no JSON: {error}")


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            # Which of two values counts is each JSON reader's own choice: two people would read two policies.
            raise ValueError(f"the field {name[:ACCESS_TEXT_CHARS_MAX]!r} is there twice in one object")
        found[name] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _object(value: Any, path: str, fields: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, "it must be an object")
    for name in value:
        if name not in fields:
            _refuse(
                f"{path}.{name[:ACCESS_TEXT_CHARS_MAX]}",
                f"there is no such field; there are {', '.join(sorted(fields))}",
            )
    return value


def _roles(value: Any) -> dict[str, frozenset[str]]:
    if not isinstance(value, dict):
        _refuse("$.roles", "it must be an object: permissions by the role's name")
    if len(value) > POLICY_ROLES_MAX:
        _refuse("$.roles", f"there are {len(value)} roles; {POLICY_ROLES_MAX} are allowed")
    roles: dict[str, frozenset[str]] = {}
    for name, permissions in value.items():
        path = f"$.roles.{name[:ACCESS_TEXT_CHARS_MAX]}"
        if name in BUILT_IN_ROLES:
            _refuse(path, "this role is built in and cannot be given another meaning; take another name")
        _name(name, path, "role's name")
        if not isinstance(permissions, list):
            _refuse(path, "it must be a list of permissions")
        for at, permission in enumerate(permissions):
            if not isinstance(permission, str) or permission not in PERMISSIONS:
                _refuse(f"{path}[{at}]", f"there is no such permission; there are {', '.join(sorted(PERMISSIONS))}")
            if permission in ADMIN_PERMISSIONS:
                _refuse(f"{path}[{at}]", f"{permission} is held by the role admin alone and by no other")
        roles[name] = frozenset(permissions)
    return roles


def _bindings(value: Any, roles: Mapping[str, frozenset[str]]) -> tuple[BindingRule, ...]:
    if not isinstance(value, list):
        _refuse("$.bindings", "it must be a list of bindings")
    if len(value) > POLICY_BINDINGS_MAX:
        _refuse("$.bindings", f"there are {len(value)} bindings; {POLICY_BINDINGS_MAX} are allowed")
    return tuple(_binding(each, f"$.bindings[{at}]", roles) for at, each in enumerate(value))


def _binding(value: Any, path: str, roles: Mapping[str, frozenset[str]]) -> BindingRule:
    fields = _object(value, path, _BINDING_FIELDS)
    for name in _BINDING_FIELDS:
        text = fields.get(name)
        if not isinstance(text, str) or not text:
            _refuse(f"{path}.{name}", "it must be a text, and not an empty one")
        if len(text) > ACCESS_TEXT_CHARS_MAX:
            _refuse(f"{path}.{name}", f"it has {len(text)} characters; {ACCESS_TEXT_CHARS_MAX} are allowed")
    binding = BindingRule(**fields)
    if not binding.principal.strip(ANY):
        _refuse(f"{path}.principal", "a binding for everybody is no binding; name a principal, or a pattern with more")
    if not _PRINCIPAL_PATTERN.match(binding.principal):
        _refuse(f"{path}.principal", "principals are printable ASCII without blanks and quotes")
    if binding.role not in BUILT_IN_ROLES and binding.role not in roles:
        _refuse(f"{path}.role", "nobody defined this role")
    if binding.tenant != ANY:
        _name(binding.tenant, f"{path}.tenant", "tenant's name")
    if not _RESOURCE_PATTERN.match(binding.resource):
        _refuse(f"{path}.resource", "a pattern has letters, digits and . _ @ + : / - and *")
    return binding


def _name(text: str, path: str, what: str) -> None:
    try:
        check_name(text, what)
    except HoldfastError as error:
        _refuse(path, error.message)


def _refuse(path: str, why: str) -> NoReturn:
    raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the policy is malformed at {path}: {why}", facts={"path": path})
