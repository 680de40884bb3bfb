"""Every call of every service says what it asks of its caller, in words that the program knows."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Final

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor

from holdfast_core.model.access.permissions import (
    BUILT_IN_ROLES,
    CLUSTER_PERMISSIONS,
    IMPLIED_PERMISSIONS,
    PERMISSIONS,
    SESSION_OWN,
)
from holdfast_core.runtime.rules import all_rules, rule_of
from holdfast_proto.v1.rules_pb2 import Rule
from tests.meta.tree import text_of, tracked

VERBS: Final = {"put", "get", "has", "scan", "delete", "status", "peer"}
"""What a capability may name."""

OF_NODES: Final = {"BlockService", "PeerService"}
"""Services of storage nodes, which ask for capabilities and keep no audit log."""

FOREIGN: Final = {"etcd"}
"""Contracts of services that are not ours."""

LOCAL: Final = {"agent"}
"""Contracts of services that act for whoever reaches them: the rules are asked where they call the cluster."""


def methods() -> dict[str, MethodDescriptor]:
    """Every call in the proto files, found in the files themselves and not in the table that the guard asks."""
    found: dict[str, MethodDescriptor] = {}
    for path in tracked():
        if path.suffix == ".proto" and path.stem not in FOREIGN | LOCAL:
            file: FileDescriptor = importlib.import_module(f"holdfast_proto.v1.{path.stem}_pb2").DESCRIPTOR
            for service in file.services_by_name.values():
                found |= {f"/{service.full_name}/{method.name}": method for method in service.methods}
    return found


def test_every_call_has_a_rule_that_the_guard_finds() -> None:
    assert len(methods()) > 40
    assert set(all_rules()) == set(methods())
    assert not [name for name in methods() if rule_of(name) is None]
    assert rule_of("/holdfast.v1.StateService/Nothing") is None


def test_every_rule_asks_for_one_thing_that_exists() -> None:
    for name, method in methods().items():
        rule = rule_of(name) or Rule()
        of_nodes = method.containing_service.name in OF_NODES
        assert (rule.verb == "peer") == (method.containing_service.name == "PeerService"), name
        assert bool(rule.verb) == of_nodes, name
        assert bool(rule.permission) != of_nodes, name
        assert rule.verb in VERBS | {""}, name
        assert rule.permission in PERMISSIONS | IMPLIED_PERMISSIONS | {""}, name
        assert rule.permission_otherwise in PERMISSIONS | {""}, name
        assert not (of_nodes and rule.recorded), f"{name}: nodes have no audit log"


def test_a_rule_is_of_the_cluster_or_of_tenants_and_not_of_both() -> None:
    for name in methods():
        rule = rule_of(name) or Rule()
        if rule.permission_otherwise:
            sides = {each in CLUSTER_PERMISSIONS for each in (rule.permission, rule.permission_otherwise)}
            assert len(sides) == 1, name
        if rule.sessions_too or rule.permission == SESSION_OWN:
            assert name.startswith("/holdfast.v1.StateService/"), f"{name}: sessions are the state service's"


def test_what_changes_or_reads_state_is_recorded() -> None:
    unrecorded = {name.rpartition("/")[2] for name in methods() if (rule := rule_of(name)) and not rule.recorded}
    of_nodes = {method.name for method in methods().values() if method.containing_service.name in OF_NODES}
    assert unrecorded - of_nodes == {
        # What a cluster, its nodes and its clients do by themselves all the time; denied ones are recorded too.
        *("Heartbeat", "KeepAlive", "WatchCluster", "Locate"),
        # Reads of the cluster and of oneself, and a plan that changes nothing.
        *("ListNodes", "GetLayout", "GetClusterStatus", "PlanLayout", "WhoAmI", "GetAuditHead"),
        *("GetLayoutHistory", "GetCollection"),
    }


def test_only_known_calls_stream_their_answers() -> None:
    """A stream's handler must have its call recorded before the first message; a new one has to be looked at."""
    streams = {
        method.name
        for method in methods().values()
        if method.server_streaming and method.containing_service.name not in OF_NODES
    }
    assert streams == {"WatchCluster", "ExportAuditRecords"}


def test_the_documents_table_of_roles_is_the_programs() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (all|`[^|]+`) \|$", text_of(Path("docs/security.md")), re.MULTILINE)
    told = {role: PERMISSIONS if cell == "all" else frozenset(re.findall(r"`([a-z.]+)`", cell)) for role, cell in rows}
    assert told == dict(BUILT_IN_ROLES)
