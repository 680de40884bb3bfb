"""The guard's order of work: tenant, coarse look, what the handler must say, and no answer without its record."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import Call, current_call
from holdfast_coordinator.access.refusals import RefusalCounts
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.credentials import new_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_core.runtime.server import ServiceHost
from holdfast_core.runtime.status import error_from_rpc
from tests.coordinator.access_rig import ADMIN, Act, KeptLedger, Rig, running
from tests.coordinator.rig import eventually, refused

WRITER = ("agent-7", "backup-writer", "default", "vm/web-*")


@pytest.fixture
async def rig(store: SqliteStore, clock: ManualClock) -> AsyncIterator[Rig]:
    async with running(store, clock) as rig:
        yield rig


@pytest.fixture
async def agent(rig: Rig) -> str:
    """The token of a principal that may write backups of some VMs of the default tenant."""
    await rig.bind(WRITER)
    return await rig.token_of("agent-7")


def requiring(resource: str, permission: str = "") -> Act:
    """A handler that says what it is about."""

    async def act(call: Call) -> None:
        call.require(resource, permission=permission)

    return act


async def test_an_allowed_call_is_served_in_its_tenant_and_recorded(rig: Rig, agent: str) -> None:
    async with rig.client(agent) as client:
        await client.call("GetVm")
    call = rig.tiny.calls[0]
    assert (call.principal, str(call.tenant), call.permission) == ("agent-7", "default", "vm.list")
    assert rig.actions() == [("agent-7", "default", "vm.list", "vm/web-1", "OK")]
    assert rig.ledger.records[0].request_id
    with pytest.raises(RuntimeError, match="no call"):
        current_call()


async def test_a_resource_outside_the_pattern_is_denied_and_recorded(rig: Rig, agent: str) -> None:
    rig.tiny.act = requiring("vm/db-1")
    async with rig.client(agent) as client:
        error = await refused(ErrorCode.DENIED, client.call("GetVm"))
    assert error.facts == {"permission": "vm.list", "resource": "vm/db-1"}
    assert rig.actions() == [("agent-7", "default", "vm.list", "vm/db-1", "DENIED")]


@pytest.mark.parametrize(
    "name", ["ResolvePoint", "ForgetPoint", "ListObjects", "ListTenants", "ListTokens", "GetPolicy"]
)
async def test_what_is_held_nowhere_is_denied_before_the_handler(rig: Rig, agent: str, name: str) -> None:
    async with rig.client(agent) as client:
        await refused(ErrorCode.DENIED, client.call(name))
    assert not rig.tiny.calls
    assert [(action[0], action[3], action[4]) for action in rig.actions()] == [("agent-7", "", "DENIED")]


async def test_who_is_bound_to_nothing_may_ask_who_it_is_and_nothing_else(rig: Rig) -> None:
    await rig.bind(WRITER)
    async with rig.client(await rig.token_of("stranger")) as client:
        answer = await client.call("WhoAmI")
        assert (answer.principal, answer.tenant, list(answer.bindings)) == ("stranger", "", [])
        for name in ("GetVm", "KeepAlive", "WatchCluster", "ExportAuditRecords", "ListTenants"):
            await refused(ErrorCode.DENIED, client.call(name))
    async with rig.client(await rig.token_of("stranger"), tenant="blue") as client:
        assert (await client.call("WhoAmI")).tenant == ""
    assert len(rig.ledger.records) == 5, "denials are recorded, whether the rule asks for records or not"
    assert not rig.tiny.calls


async def test_a_permission_of_the_cluster_needs_a_binding_for_all_tenants(rig: Rig) -> None:
    await rig.bind(("one", "admin", "default", "*"), ("all", "admin", "*", "*"))
    rig.tiny.act = requiring("tenant/*")
    async with rig.client(await rig.token_of("one")) as client:
        await refused(ErrorCode.DENIED, client.call("ListTenants"))
    async with rig.client(await rig.token_of("all"), tenant="blue") as client:
        await client.call("ListTenants")
    assert rig.actions()[1] == ("all", "", "tenant.admin", "tenant/*", "OK"), "the cluster's calls have no tenant"
    assert rig.tiny.calls[0].tenant is None


async def test_the_tenant_of_a_call(rig: Rig) -> None:
    await rig.bind(
        ("blue-only", "restorer", "blue", "*"),
        ("two", "restorer", "blue", "*"),
        ("two", "restorer", "green", "*"),
        ("default-too", "restorer", "blue", "*"),
        ("default-too", "restorer", "default", "*"),
        ("everywhere", "restorer", "*", "*"),
        ("astray", "restorer", "gone", "*"),
    )
    tokens = {name: await rig.token_of(name) for name in ("blue-only", "two", "default-too", "everywhere", "astray")}

    async def served(principal: str, tenant: str = "") -> object:
        async with rig.client(tokens[principal], tenant=tenant) as client:
            await client.call("GetVm")
        return rig.tiny.calls[-1].tenant

    assert await served("blue-only") == "blue"
    assert await served("default-too") == "default"
    assert await served("default-too", "blue") == "blue"
    assert await served("everywhere") == "default"
    assert await served("everywhere", "green") == "green"
    error = await refused(ErrorCode.INVALID_ARGUMENT, served("two"))
    assert "blue, green" in error.message
    assert await served("two", "green") == "green"
    foreign = await refused(ErrorCode.DENIED, served("two", "default"))
    nowhere = await refused(ErrorCode.DENIED, served("two", "nowhere"))
    assert foreign.message.replace("default", "?") == nowhere.message.replace("nowhere", "?")
    await refused(ErrorCode.NOT_FOUND, served("everywhere", "nowhere"))
    await refused(ErrorCode.NOT_FOUND, served("astray"))
    await refused(ErrorCode.INVALID_ARGUMENT, served("everywhere", "a/b"))
    assert [each.outcome for each in rig.ledger.records].count("OK") == 6
    told = {(each.principal, each.tenant, each.outcome) for each in rig.ledger.records if each.outcome != "OK"}
    assert told == {
        ("two", "", "INVALID_ARGUMENT"),
        ("two", "default", "DENIED"),
        ("two", "nowhere", "DENIED"),
        ("everywhere", "nowhere", "NOT_FOUND"),
        ("everywhere", "", "INVALID_ARGUMENT"),
        ("astray", "gone", "NOT_FOUND"),
    }


async def test_sessions_go_on_for_who_may_begin_them(rig: Rig, agent: str) -> None:
    rig.tiny.act = requiring("vm/web-1", "snapshot.create")
    await rig.bind(WRITER, ("reader", "restorer", "default", "*"), ("auditor", "auditor", "*", "*"))
    async with rig.client(agent) as client:
        await client.call("KeepAlive")
        assert not rig.ledger.records, "a rule that asks for no record"
        await client.call("RefreshGrant")
    assert rig.actions() == [("agent-7", "default", "snapshot.create", "vm/web-1", "OK")]
    async with rig.client(await rig.token_of("reader")) as client:
        await refused(ErrorCode.DENIED, client.call("KeepAlive"))
    async with rig.client(await rig.token_of("auditor")) as client:
        await refused(ErrorCode.DENIED, client.call("RefreshGrant"))


async def test_a_second_permission_lets_in_and_the_handler_decides(rig: Rig) -> None:
    await rig.store.txn(
        [],
        [
            Put(
                keyspace.ACCESS_POLICY,
                b'{"format": 1, "roles": {"inc": ["backup.create"]}, "bindings": '
                b'[{"principal": "p", "role": "inc", "tenant": "default", "resource": "*"}]}',
            )
        ],
    )
    await rig.view.fresh()
    async with rig.client(await rig.token_of("p")) as client:
        await refused(ErrorCode.DENIED, client.call("BeginPoint"))

        async def incremental(call: Call) -> None:
            call.require("vm/web-1", otherwise=True)

        rig.tiny.act = incremental
        await client.call("BeginPoint")
    assert [action[2:] for action in rig.actions()] == [
        ("snapshot.create", "vm/web-1", "DENIED"),
        ("backup.create", "vm/web-1", "OK"),
    ]


async def test_a_handler_that_says_nothing_answers_nothing(rig: Rig, agent: str) -> None:
    async def silent(call: Call) -> None:
        assert not call.checked

    rig.tiny.act = silent
    async with rig.client(agent) as client:
        error = await refused(ErrorCode.INTERNAL, client.call("GetVm"))
        assert "did not say what it is about" in error.message
        await refused(ErrorCode.INTERNAL, client.call("KeepAlive"))
    assert [action[4] for action in rig.actions()] == ["INTERNAL"]


async def test_failures_and_faults_are_recorded_as_what_they_are(rig: Rig, agent: str) -> None:
    async def busy(call: Call) -> None:
        call.require("vm/web-1")
        raise HoldfastError(ErrorCode.BUSY, "later")

    async def broken(call: Call) -> None:
        call.require("vm/web-1")
        raise KeyError("planted")

    async def again(call: Call) -> None:
        call.require("vm/web-1")
        call.entry.repeated()

    async with rig.client(agent) as client:
        rig.tiny.act = busy
        await refused(ErrorCode.BUSY, client.call("GetVm"))
        await refused(ErrorCode.BUSY, client.call("KeepAlive"))
        rig.tiny.act = broken
        error = await refused(ErrorCode.INTERNAL, client.call("GetVm"))
        assert "planted" not in error.message
        rig.tiny.act = again
        await client.call("GetVm")
    assert [each.outcome for each in rig.ledger.records] == ["BUSY", "INTERNAL", "REPEATED"]


async def test_what_the_handler_recorded_is_not_recorded_again(rig: Rig, agent: str) -> None:
    async def recording(call: Call) -> None:
        call.require("vm/web-1")
        await rig.ledger.record(call.entry)

    rig.tiny.act = recording
    async with rig.client(agent) as client:
        await client.call("GetVm")
    assert len(rig.ledger.records) == 1


async def test_no_answer_leaves_without_its_record(rig: Rig, agent: str) -> None:
    rig.ledger.away = True
    async with rig.client(agent) as client:
        await refused(ErrorCode.UNREACHABLE, client.call("GetVm"))
        await client.call("KeepAlive")
        rig.tiny.act = requiring("vm/db-1")
        await refused(ErrorCode.UNREACHABLE, client.call("GetVm"))
        await refused(ErrorCode.UNREACHABLE, client.call("KeepAlive"))

        async def lost(call: Call) -> None:
            call.require("vm/web-1")
            raise HoldfastError(ErrorCode.UNREACHABLE, "the handler's own words")

        rig.tiny.act = lost
        assert (await refused(ErrorCode.UNREACHABLE, client.call("GetVm"))).message == "the handler's own words"

        async def broken(call: Call) -> None:
            raise KeyError("planted")

        rig.tiny.act = broken
        await refused(ErrorCode.INTERNAL, client.call("GetVm"))
    assert not rig.ledger.records


async def test_rights_end_within_a_call_that_goes_on(rig: Rig, agent: str, clock: ManualClock) -> None:
    seen: list[tuple[bool, bool]] = []
    entered, go_on = asyncio.Event(), asyncio.Semaphore(0)

    async def watching(call: Call) -> None:
        call.filtered()
        for _ in range(3):
            seen.append((call.may("cluster.read", ""), call.may("vm.list", "vm/web-1")))
            entered.set()
            await go_on.acquire()

    rig.tiny.act = watching
    async with rig.client(agent) as client:
        watch = asyncio.ensure_future(client.call("WatchCluster"))
        await entered.wait()
        await rig.bind(("agent-7", "restorer", "default", "vm/db-*"))
        go_on.release()
        await eventually(lambda: _holds(len(seen) == 2), "the second look")
        clock.advance(60)
        go_on.release()
        await eventually(lambda: _holds(len(seen) == 3), "the third look")
        go_on.release()
        await watch
    assert seen == [(True, True), (True, False), (False, False)]


async def _holds(condition: bool) -> bool:
    return condition


async def test_everywhere_means_a_binding_for_all_tenants(rig: Rig) -> None:
    await rig.bind(("one", "auditor", "default", "*"), ("all", "auditor", "*", "*"))
    for name in ("one", "all"):
        async with rig.client(await rig.token_of(name)) as client:
            await client.call("GetVm")
    assert [call.allows_everywhere("cluster.read", "") for call in rig.tiny.calls] == [False, True]


async def test_a_call_without_a_rule_is_refused(rig: Rig) -> None:
    guard = rig.host._calls._guard
    host = ServiceHost("test", bind="127.0.0.1:0", guard=guard)
    reached = []

    async def handler(request: bytes, context: object) -> bytes:
        reached.append(request)
        return request

    def add(servicer: object, server: grpc.aio.Server) -> None:
        handlers: dict[str, Any] = {"Call": grpc.unary_unary_rpc_method_handler(handler)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Ruleless", handlers),))

    host.add(add, object(), "test.Ruleless")
    await host.start()
    channel = open_channel(host.address)
    ruleless: Any = channel.unary_unary("/test.Ruleless/Call")
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ruleless(b"x", metadata=[("authorization", f"Bearer {ADMIN}")])
        error = error_from_rpc(caught.value, peer="test")
        assert (error.code, "has no rule" in error.message) == (ErrorCode.INTERNAL, True)
        assert not reached
    finally:
        await channel.close()
        await host.stop(0)


async def test_a_flood_of_strangers_leaves_one_record_a_minute(rig: Rig, clock: ManualClock) -> None:
    counting = asyncio.ensure_future(rig.refusals.run())
    async with rig.client(new_token(random.randbytes)) as client, rig.client() as nobody:
        await refused(ErrorCode.UNAUTHENTICATED, client.call("GetVm"))
        await eventually(lambda: _holds(len(rig.ledger.records) == 1), "the first record")
        for _ in range(50):
            await refused(ErrorCode.UNAUTHENTICATED, client.call("GetVm"))
        await refused(ErrorCode.UNAUTHENTICATED, nobody.call("GetVm"))
        rig.ledger.away = True
        clock.advance(60)
        await eventually(lambda: _holds(clock.sleeper_count == 1), "the record that could not be written")
        rig.ledger.away = False
        assert len(rig.ledger.records) == 1
        clock.advance(60)
        await eventually(lambda: _holds(len(rig.ledger.records) == 2), "the second record")
    counting.cancel()
    assert rig.actions() == [("", "", "auth.refused", "", "UNAUTHENTICATED")] * 2
    assert rig.ledger.records[1].details == {"count": "51", "unknown": "50", "absent": "1"}
    assert (rig.counted("unknown"), rig.counted("absent")) == (51, 1)
    assert not rig.tiny.calls


async def test_a_policy_of_another_hand_that_cannot_be_read_changes_nothing(rig: Rig, agent: str) -> None:
    await rig.store.txn([], [Put(keyspace.ACCESS_POLICY, b'{"format": 1, "bindings": ["\xff"]}')])
    await rig.view.fresh()
    assert rig.registry.get_sample_value("holdfast_policy_malformed") == 1
    async with rig.client(agent) as client:
        await client.call("GetVm")
    await rig.bind(("agent-7", "node", "*", "*"))
    assert rig.registry.get_sample_value("holdfast_policy_malformed") == 0
    async with rig.client(agent) as client:
        await refused(ErrorCode.DENIED, client.call("GetVm"))


async def test_changes_arrive_by_the_watch(rig: Rig, clock: ManualClock) -> None:
    view = rig.view
    following = asyncio.ensure_future(view.run())
    token = await rig.token_of("agent-7")
    await rig.store.txn([], [Put(keyspace.ACCESS_POLICY, b'{"format": 1, "bindings": []}')])
    await eventually(lambda: _holds(view.policy.bindings == ()), "the new policy")
    key = keyspace.token(token.split("_")[1])
    stored = await rig.store.get(key)
    assert stored is not None
    other = keyspace.token("0" * 16)
    await rig.store.txn([], [Delete(key), Put(other, stored.value), Put(keyspace.revoked(bytes(32)), b"\xff")])
    await eventually(lambda: _holds(view.is_revoked(bytes(32))), "the mark, though it cannot be read")
    assert not view.tokens, "a record under another token's key proves nothing"
    await rig.store.txn([], [Delete(keyspace.revoked(bytes(32))), Delete(keyspace.ACCESS_POLICY), Put(key, b"\xff")])
    await eventually(lambda: _holds(not view.is_revoked(bytes(32))), "the mark's end")
    assert len(view.policy.bindings) == 2, "without a policy the first one holds"
    assert not view.tokens
    following.cancel()


def test_the_metric_and_the_record_need_no_more_than_their_parts(store: SqliteStore, clock: ManualClock) -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    counts = RefusalCounts(KeptLedger(store, clock), registry, clock=clock, random_bytes=random.randbytes)
    counts.count("absent")
    assert registry.get_sample_value("holdfast_unauthenticated_total", {"reason": "absent"}) == 1
