"""What each call asks of its caller, read from the option `rule` that stands beside the call in the proto files.

A call without a rule has no answer here, and whoever serves calls must then refuse it (ADR 0074).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from google.protobuf.descriptor import FileDescriptor

from holdfast_proto.v1 import (
    access_pb2,
    audit_pb2,
    blocks_pb2,
    cluster_pb2,
    collection_pb2,
    keys_pb2,
    peers_pb2,
    state_pb2,
    tenants_pb2,
)
from holdfast_proto.v1.rules_pb2 import Rule, rule

_FILES: tuple[FileDescriptor, ...] = (
    access_pb2.DESCRIPTOR,
    audit_pb2.DESCRIPTOR,
    blocks_pb2.DESCRIPTOR,
    cluster_pb2.DESCRIPTOR,
    collection_pb2.DESCRIPTOR,
    keys_pb2.DESCRIPTOR,
    peers_pb2.DESCRIPTOR,
    state_pb2.DESCRIPTOR,
    tenants_pb2.DESCRIPTOR,
)


@cache
def all_rules() -> Mapping[str, Rule | None]:
    """Return the rule of every call by its path (/package.Service/Method), None where a call has none."""
    rules: dict[str, Rule | None] = {}
    for file in _FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                options = method.GetOptions()
                rules[f"/{service.full_name}/{method.name}"] = (
                    options.Extensions[rule] if options.HasExtension(rule) else None
                )
    return MappingProxyType(rules)


def rule_of(method: str) -> Rule | None:
    """Return the rule of one call, by its path; None for a call without one, or of no service of ours."""
    return all_rules().get(method)
