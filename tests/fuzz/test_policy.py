"""Policy documents from anywhere: read whole or refused whole with the place, and what is read allows what it says."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast_core.model.access.permissions import PERMISSIONS
from holdfast_core.model.access.policy import DEFAULT_DOCUMENT, BindingRule, Policy, check_principal
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.fuzz.mutations import mutated_text, outcome

GOOD = Policy({}, (BindingRule("agent-7", "backup-writer", "default", "vm/web-*"),))
DOCUMENTS = [
    DEFAULT_DOCUMENT,
    GOOD.to_document(),
    json.dumps(
        {
            "format": 1,
            "roles": {"night-shift": ["point.list", "vm.list"], "empty": []},
            "bindings": [
                {"principal": "agent-*", "role": "night-shift", "tenant": "*", "resource": "vm/*"},
                {"principal": "spiffe://a/client/b", "role": "restorer", "tenant": "default", "resource": "*"},
            ],
        }
    ),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["*", "admin"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def check(document: str) -> None:
    """Refused naming the place, or read back from its own document as the same policy with known permissions alone."""
    policy = outcome(lambda: Policy.parse(document), ErrorCode.INVALID_ARGUMENT)
    if isinstance(policy, HoldfastError):
        assert policy.facts["path"].startswith("$")
        return
    assert Policy.parse(policy.to_document()) == policy
    assert all(held <= PERMISSIONS for held in policy.roles.values())
    # Nobody at all is bound to everything by a document that names nobody.
    assert not policy.allows("~", "access.admin", "", "access")
    stated = json.loads(document)["bindings"]
    assert [vars_of(binding) for binding in policy.bindings] == stated


def vars_of(binding: BindingRule) -> dict[str, str]:
    """A binding as a document says it."""
    return {name: getattr(binding, name) for name in ("principal", "role", "tenant", "resource")}


@settings(max_examples=150, deadline=None)
@given(document=st.text(max_size=120) | JSON.map(json.dumps))
@example(document="\ud800")
@example(document='{"format":1,"bindings":[],"roles":{"\ud800":[]}}')
@example(document='{"format":' + "1" * 5000 + "}")
@example(document="[" * 100_000)
def test_arbitrary_text(document: str) -> None:
    check(document)


@settings(max_examples=250, deadline=None)
@given(data=st.data(), good=st.sampled_from(DOCUMENTS), other=st.sampled_from(DOCUMENTS))
def test_a_changed_document(data: st.DataObject, good: str, other: str) -> None:
    check(data.draw(mutated_text(good, other)))


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from(["format", "roles", "bindings"]), value=JSON, good=st.sampled_from(DOCUMENTS))
def test_a_field_of_another_form(field: str, value: Any, good: str) -> None:
    check(json.dumps(json.loads(good) | {field: value}))


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from(["principal", "role", "tenant", "resource", "effect"]), value=JSON)
def test_a_binding_of_another_form(field: str, value: Any) -> None:
    document = json.loads(GOOD.to_document())
    document["bindings"][0][field] = value
    check(json.dumps(document))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(["agent-7", "spiffe://a/b"]).flatmap(mutated_text))
def test_a_principal_holds_no_wildcard_blank_or_quote(text: str) -> None:
    result = outcome(lambda: check_principal(text), ErrorCode.INVALID_ARGUMENT)
    if not isinstance(result, HoldfastError):
        assert result == text
        assert text.isascii()
        assert text.isprintable()
        assert not set(text) & set("* \"'")
