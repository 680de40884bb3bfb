"""The policy: what each role may do and where, what is refused of a document, and patterns against a reference."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.access.patterns import matches
from holdfast_core.model.access.permissions import (
    ADMIN_PERMISSIONS,
    BUILT_IN_ROLES,
    CLUSTER_PERMISSIONS,
    PERMISSIONS,
    SELF_READ,
    SESSION_OWN,
    TENANT_PERMISSIONS,
)
from holdfast_core.model.access.policy import DEFAULT_DOCUMENT, DEFAULT_POLICY, BindingRule, Policy, check_principal
from holdfast_core.model.access.tokens import proves, token_hash
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ACCESS_TEXT_CHARS_MAX, POLICY_BINDINGS_MAX, POLICY_BYTES_MAX, POLICY_ROLES_MAX

BINDING: Final = {"principal": "agent-7", "role": "backup-writer", "tenant": "default", "resource": "vm/web-*"}

WANTED: Final = {
    "admin": PERMISSIONS,
    "operator": {"cluster.read", "cluster.admin", "vm.list", "point.list", "app.list", "stats.read"},
    "backup-writer": {
        *("vm.register", "vm.list", "snapshot.create", "backup.create"),
        *("point.list", "point.lock", "stats.read", "damage.report", "cluster.read"),
    },
    "restorer": {"vm.list", "point.list", "point.restore", "damage.report", "cluster.read"},
    "app-writer": {"app.write", "app.list", "cluster.read"},
    "app-reader": {"app.read", "app.list", "damage.report", "cluster.read"},
    "auditor": {"audit.read", "vm.list", "point.list", "app.list", "stats.read", "cluster.read"},
    "node": {"cluster.join"},
}
"""Written a second time on purpose: a change of a role must be meant twice."""


def document(**changes: Any) -> str:
    """A good document with changes."""
    return json.dumps({"format": 1, "roles": {"night-shift": ["point.list"]}, "bindings": [BINDING]} | changes)


def policy(*bindings: tuple[str, str, str, str]) -> Policy:
    """A policy of bindings alone."""
    return Policy({}, tuple(BindingRule(*each) for each in bindings))


@pytest.mark.parametrize("role", sorted(WANTED))
@pytest.mark.parametrize("bound_tenant", ["*", "default"])
@pytest.mark.parametrize("pattern", ["*", "vm/web-*"])
def test_a_role_allows_its_permissions_where_it_is_bound_and_nothing_else(
    role: str, bound_tenant: str, pattern: str
) -> None:
    bound = policy(("p", role, bound_tenant, pattern))
    for permission in PERMISSIONS:
        for tenant in ("default", "other", ""):
            tenants = ("*",) if permission in CLUSTER_PERMISSIONS else ("*", tenant)
            in_scope = bound_tenant in tenants
            held = permission in WANTED[role] and in_scope
            case = (role, permission, tenant)
            assert bound.somewhere("p", permission, tenant) == held, case
            assert bound.allows("p", permission, tenant, "vm/web-1") == held, case
            assert bound.allows("p", permission, tenant, "vm/db-1") == (held and pattern == "*"), case
            assert not bound.allows("q", permission, tenant, "vm/web-1"), case


def test_every_permission_is_of_the_cluster_or_of_tenants_and_some_role_has_it() -> None:
    assert not CLUSTER_PERMISSIONS & TENANT_PERMISSIONS
    assert set(BUILT_IN_ROLES) == set(WANTED)
    assert BUILT_IN_ROLES["admin"] == CLUSTER_PERMISSIONS | TENANT_PERMISSIONS
    readers = {role for role, held in BUILT_IN_ROLES.items() if held & {"point.restore", "app.read"}}
    assert readers == {"admin", "restorer", "app-reader"}
    assert not BUILT_IN_ROLES["backup-writer"] & {"point.restore", "point.forget", "app.forget", "keys.rotate"}


def test_only_an_administrator_lifts_locks() -> None:
    holders = {role for role, held in BUILT_IN_ROLES.items() if held & ADMIN_PERMISSIONS}
    assert holders == {"admin"}
    for permission in ADMIN_PERMISSIONS:
        with pytest.raises(HoldfastError, match="held by the role admin alone") as caught:
            Policy.parse(json.dumps({"format": 1, "roles": {"mine": ["point.list", permission]}, "bindings": []}))
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert caught.value.facts["path"] == "$.roles.mine[1]"


def test_by_default_nothing_is_allowed() -> None:
    empty = policy()
    assert empty.bindings_of("p") == ()
    assert empty.tenants_of("p") == frozenset()
    assert not any(empty.somewhere("p", permission, "default") for permission in (*PERMISSIONS, SESSION_OWN))
    assert empty.somewhere("p", SELF_READ, "")


def test_sessions_belong_to_who_may_begin_them() -> None:
    bound = policy(("w", "backup-writer", "default", "vm/web-*"), ("r", "restorer", "default", "*"))
    assert bound.somewhere("w", SESSION_OWN, "default")
    assert bound.allows("w", SESSION_OWN, "default", "vm/web-1")
    assert not bound.allows("w", SESSION_OWN, "default", "vm/db-1")
    assert not bound.somewhere("w", SESSION_OWN, "other")
    assert not bound.somewhere("r", SESSION_OWN, "default")


def test_bindings_add_up_and_keep_their_order() -> None:
    bound = policy(
        ("agent-*", "restorer", "b", "vm/*"), ("agent-7", "app-reader", "a", "task/*"), ("other", "admin", "*", "*")
    )
    assert [each.role for each in bound.bindings_of("agent-7")] == ["restorer", "app-reader"]
    assert bound.tenants_of("agent-7") == {"a", "b"}
    assert not bound.allows("agent-7", "app.read", "b", "task/x"), "a role of one binding in the tenant of another"
    more = bound.rights_of("agent-7", [BindingRule("agent-7", "node", "*", "node/*")])
    assert more.allows("cluster.join", "", "node/1")
    assert not bound.allows("agent-7", "cluster.join", "", "node/1")


def test_a_document_reads_back_and_changes_by_binding() -> None:
    read = Policy.parse(document())
    assert read.permissions_of("night-shift") == {"point.list"}
    assert Policy.parse(read.to_document()) == read
    more = BindingRule("p", "night-shift", "*", "*")
    assert read.bound(more).bound(more).bindings == (BindingRule(**BINDING), more)
    assert read.bound(more).unbound(more) == read.unbound(more) == read
    assert Policy.parse(DEFAULT_DOCUMENT) == DEFAULT_POLICY
    assert DEFAULT_POLICY.allows("spiffe://holdfast/admin/ada", "access.admin", "", "access")
    assert not DEFAULT_POLICY.allows("spiffe://holdfast/client/ada", "vm.list", "default", "vm/x")


BAD_TEXTS: Final[dict[str, list[Any]]] = {
    "principal": ["*", "**", "", 7, None, "a b", 'a"b', "x" * (ACCESS_TEXT_CHARS_MAX + 1), "é", "\ud800"],
    "role": ["", "nobody", "night-shift*", []],
    "tenant": ["", "a/b", "web-*", "x" * 129],
    "resource": ["", "vm/a b", "vm/?\\", "x" * (ACCESS_TEXT_CHARS_MAX + 1)],
    "effect": ["deny"],
}

MALFORMED: Final[dict[str, tuple[str, str]]] = {
    "no JSON": ("{", "$"),
    "a list": ("[]", "$"),
    "too deep": ("[" * 100_000, "$"),
    "not a number": ('{"format": NaN, "bindings": []}', "$"),
    "a field twice": ('{"format": 1, "format": 1, "bindings": []}', "$"),
    "a field twice within": (document().replace('"role":', '"role": "admin", "role":', 1), "$"),
    "no format": ('{"bindings": []}', "$.format"),
    "another format": (document(format=2), "$.format"),
    "true for a format": (document(format=True), "$.format"),
    "1.0 for a format": (document(format=1.0), "$.format"),
    "an unknown field": (document(deny=[]), "$.deny"),
    "roles as a list": (document(roles=[]), "$.roles"),
    "a built-in role": (document(roles={"admin": []}), "$.roles.admin"),
    "a role's bad name": (document(roles={"a b": []}), "$.roles.a b"),
    "a role of no list": (document(roles={"r": "vm.list"}), "$.roles.r"),
    "an unknown permission": (document(roles={"r": ["vm.list", "vm.destroy"]}), "$.roles.r[1]"),
    "a permission that is never bound": (document(roles={"r": [SESSION_OWN]}), "$.roles.r[0]"),
    "a number for a permission": (document(roles={"r": [1]}), "$.roles.r[0]"),
    "too many roles": (document(roles={f"r{n}": [] for n in range(POLICY_ROLES_MAX + 1)}), "$.roles"),
    "no bindings": ('{"format": 1}', "$.bindings"),
    "bindings as an object": (document(bindings={}), "$.bindings"),
    "too many bindings": (document(bindings=[1] * (POLICY_BINDINGS_MAX + 1)), "$.bindings"),
    "a text for a binding": (document(bindings=["admin"]), "$.bindings[0]"),
    "too large": (document() + " " * POLICY_BYTES_MAX, "$"),
    **{
        f"a binding with {name} {value!r}": (
            document(bindings=[BINDING, BINDING | {name: value}]),
            f"$.bindings[1].{name}",
        )
        for name, values in BAD_TEXTS.items()
        for value in values
    },
    **{
        f"a binding without {name}": (
            document(bindings=[{key: value for key, value in BINDING.items() if key != name}]),
            f"$.bindings[0].{name}",
        )
        for name in BINDING
    },
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_document_is_refused_with_the_place(case: str) -> None:
    text, path = MALFORMED[case]
    with pytest.raises(HoldfastError, match="the policy is malformed at") as caught:
        Policy.parse(text)
    assert (caught.value.code, caught.value.facts["path"]) == (ErrorCode.INVALID_ARGUMENT, path)


@given(text=st.text(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_text_does_worse_than_being_refused(text: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        Policy.parse(text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@given(pattern=st.text("ab/*", max_size=12), text=st.text("ab/\n", max_size=12))
def test_patterns_are_what_a_regular_expression_says(pattern: str, text: str) -> None:
    reference = "".join(".*" if each == "*" else re.escape(each) for each in pattern)
    assert matches(pattern, text) == bool(re.fullmatch(reference, text, re.DOTALL))


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    began_s = time.monotonic()
    assert not matches("*a" * 127 + "*b", "a" * 256)
    assert time.monotonic() - began_s < 0.5


@pytest.mark.parametrize(
    "name", ["agent-7", "a@b", "spiffe://holdfast/client/ada", "urn:uuid:1-2", "mailto:a@b/c?d=%20"]
)
def test_principals_are_names_and_uris(name: str) -> None:
    assert check_principal(name) == name


@pytest.mark.parametrize(
    "name", ["", "*", "a*", "a b", "a/b", "../x", "a'b", 'a"b', "a\n", "é", "-a", "a:" + "b" * 255]
)
def test_other_principals_are_refused(name: str) -> None:
    with pytest.raises(HoldfastError, match="cannot name a principal") as caught:
        check_principal(name)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_only_the_secret_itself_proves_a_token() -> None:
    kept = token_hash(bytes(32))
    assert len(kept) == 32
    assert proves(bytes(32), kept)
    assert not proves(bytes(31) + b"\1", kept)
    assert not proves(bytes(32), b"")
