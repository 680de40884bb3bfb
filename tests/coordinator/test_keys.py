"""Keys that change: signing keys by time, keys of the log under the old one's signature, epochs once for each call."""

from __future__ import annotations

import asyncio

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.chain import RETIREMENT_MS
from holdfast_coordinator.keys.signing import LIVING_KEYS_MAX
from holdfast_coordinator.keys.tenant_keys import Wanted
from holdfast_coordinator.records import each, parse
from holdfast_core.model.audit.heads import HeadVerifier
from holdfast_core.model.audit.record import OK, REPEATED, ROTATE_AUDIT_ACTION
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import CAPABILITY_TTL_S, CLOCK_TOLERANCE_S, SIGNING_KEY_SPREAD_S
from holdfast_core.runtime.capability import CapabilityVerifier
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1.audit_pb2 import AuditBatch
from holdfast_proto.v1.records_pb2 import WrappedSecret
from holdfast_proto.v1.tenants_pb2 import TenantRecord
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.key_rig import Keys, make_entry, open_keys
from tests.coordinator.rig import eventually, refused

DATA = Wanted(data=True, structure=False)


def capability_of(keys: Keys, clock: ManualClock) -> str:
    return keys.chain.capability_signer().mint(
        tenant=1,
        verbs=frozenset({"get"}),
        kinds=frozenset({0}),
        ttl_s=CAPABILITY_TTL_S,
        now_unix_ms=clock.now_unix_ms(),
    )


def verifier_of(keys: Keys) -> CapabilityVerifier:
    return CapabilityVerifier(keys.cluster_id, {key.key_id: key.public_key for key in keys.chain.verifying_keys()})


async def test_a_new_signing_key_is_known_before_it_signs_and_the_old_one_stays_while_it_counts(
    store: SqliteStore, clock: ManualClock
) -> None:
    keys = await open_keys(store, clock)
    first = keys.chain.signing_key().key_id
    made = await keys.signing.rotate_capability(make_entry(), after=first)
    assert [key.key_id for key in keys.chain.verifying_keys()] == [first, made.key_id]
    clock.advance(SIGNING_KEY_SPREAD_S - 0.001)
    assert keys.chain.signing_key().key_id == first
    last = capability_of(keys, clock)
    clock.advance(0.001)
    assert keys.chain.signing_key().key_id == made.key_id

    # What the old key signed last is good to its end, by the node's clock at its latest.
    clock.advance(CAPABILITY_TTL_S + CLOCK_TOLERANCE_S - 0.1)
    await keys.chain.sweep()
    await keys.chain.fresh()
    assert verifier_of(keys).verify(last, now_unix_ms=clock.now_unix_ms()).tenant == 1
    clock.advance(RETIREMENT_MS / 1000)
    await keys.chain.sweep()
    await keys.chain.fresh()
    assert [key.key_id for key in keys.chain.verifying_keys()] == [made.key_id]
    with pytest.raises(HoldfastError, match="does not know"):
        verifier_of(keys).verify(last, now_unix_ms=clock.now_unix_ms())
    await keys.chain.sweep()
    assert len([item async for item in each(store, keyspace.SIGNING_PREFIX)]) == 1, "the last one stays"


async def test_a_stolen_signing_key_goes_at_once(store: SqliteStore, clock: ManualClock) -> None:
    keys = await open_keys(store, clock)
    stolen = capability_of(keys, clock)
    first = keys.chain.signing_key().key_id
    between = await keys.signing.rotate_capability(make_entry())
    made = await keys.signing.rotate_capability(make_entry(), after=first, retire_now=True)
    assert [key.key_id for key in keys.chain.verifying_keys()] == [made.key_id]
    assert made.key_id not in (first, between.key_id)
    with pytest.raises(HoldfastError, match="does not know"):
        verifier_of(keys).verify(stolen, now_unix_ms=clock.now_unix_ms())
    assert verifier_of(keys).verify(capability_of(keys, clock), now_unix_ms=clock.now_unix_ms()).tenant == 1
    entry = make_entry()
    again = await keys.signing.rotate_capability(entry, after=first, retire_now=True)
    assert (again.key_id, entry.outcome) == (made.key_id, REPEATED)


async def test_the_same_call_twice_makes_one_key_on_whichever_coordinator(
    store: SqliteStore, clock: ManualClock
) -> None:
    coordinators = [await open_keys(store, clock, seed=seed) for seed in (1, 2)]
    first, audit = coordinators[0].chain.signing_key().key_id, coordinators[0].chain.audit_key().key_id
    entries = [make_entry() for _ in range(4)]
    made = await asyncio.gather(
        *(coordinators[n % 2].signing.rotate_capability(entries[n], after=first) for n in range(4))
    )
    assert len({key.key_id for key in made}) == 1
    assert sorted(entry.outcome for entry in entries) == [OK, REPEATED, REPEATED, REPEATED]
    heads = await asyncio.gather(
        *(coordinators[n % 2].signing.rotate_audit(make_entry(), after=audit) for n in range(4))
    )
    assert len({key.key_id for key in heads}) == 1
    epochs = await asyncio.gather(
        *(coordinators[n % 2].rotation.rotate(make_entry(), 1, Wanted(True, True, 1, 1)) for n in range(4))
    )
    assert {(max(each.data_epochs), max(each.structure_epochs)) for each in epochs} == {(2, 2)}
    assert all(each == epochs[0] for each in epochs)


async def test_no_more_signing_keys_live_than_nodes_are_told_of(store: SqliteStore, clock: ManualClock) -> None:
    keys = await open_keys(store, clock)
    for _ in range(LIVING_KEYS_MAX - 1):
        await keys.signing.rotate_capability(make_entry())
    assert len({key.key_id for key in keys.chain.verifying_keys()}) == LIVING_KEYS_MAX
    error = await refused(ErrorCode.LIMIT_EXCEEDED, keys.signing.rotate_capability(make_entry()))
    assert "--retire-now" in error.message
    await keys.signing.rotate_capability(make_entry(), retire_now=True)
    assert len(keys.chain.verifying_keys()) == 1


async def test_another_coordinator_learns_of_a_key_by_its_watch(store: SqliteStore, clock: ManualClock) -> None:
    one, other = await open_keys(store, clock, seed=1), await open_keys(store, clock, seed=2)
    following = asyncio.create_task(other.chain.run())
    made = await one.signing.rotate_capability(make_entry())
    audit = await one.signing.rotate_audit(make_entry())

    async def knows() -> bool:
        told = {key.key_id for key in other.chain.verifying_keys()}
        return made.key_id in told and other.chain.audit_key().key_id == audit.key_id

    await eventually(knows, "the other coordinator has both keys")
    following.cancel()
    await asyncio.wait([following])


async def test_a_verifier_of_the_log_comes_to_trust_a_new_key_by_the_old_ones_signature(
    store: SqliteStore, clock: ManualClock
) -> None:
    keys = await open_keys(store, clock)
    (first,) = keys.chain.audit_keys()
    await keys.signing.rotate_capability(make_entry())
    entry = make_entry()
    made = await keys.signing.rotate_audit(entry)
    await keys.signing.rotate_capability(make_entry())
    verifier = HeadVerifier(keys.cluster_id, {first.key_id: first.public_key})
    used = []
    async for item in each(store, keyspace.AUDIT_BATCHES_PREFIX):
        batch = parse(item, AuditBatch).message
        verifier.check(batch.head)
        used.append(batch.head.key_id)
        for line in batch.lines:
            if ROTATE_AUDIT_ACTION.encode() in line:
                assert made.public_key.hex().encode() in line
                verifier.trust(entry.details["key_id"], bytes.fromhex(entry.details["public_key"]))
    assert used == [first.key_id, first.key_id, made.key_id]
    assert [key.key_id for key in keys.chain.audit_keys()] == [first.key_id, made.key_id]


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER])
@pytest.mark.parametrize("at", range(6))
async def test_a_rotation_whose_answer_is_lost_rotates_once_when_it_is_sent_again(
    store: SqliteStore, clock: ManualClock, fault: Fault, at: int
) -> None:
    faults = FaultyStore(store)
    keys = await open_keys(faults, clock)
    faults.arm(fault, at=at)
    wanted = Wanted(data=True, structure=False, after_data_epoch=1)
    entries = [make_entry(), make_entry()]
    for entry in entries:
        await asyncio.gather(keys.rotation.rotate(entry, 1, wanted), return_exceptions=True)
    faults.arm(None)
    secrets = await keys.chain.secrets(1)
    assert list(secrets.data_epochs) == [1, 2]
    item = await store.get(keyspace.tenant_record(1))
    assert item is not None
    assert parse(item, TenantRecord).message.keys_version == 1


async def test_old_epochs_and_roots_stay(store: SqliteStore, clock: ManualClock) -> None:
    keys = await open_keys(store, clock)
    before = await keys.chain.secrets(1)
    after = await keys.rotation.rotate(make_entry(), 1, DATA)
    assert (after.data_root, after.structure_root) == (before.data_root, before.structure_root)
    assert (list(after.data_epochs), after.data_epochs[1]) == ([1, 2], before.data_epochs[1])
    assert after.structure_epochs == before.structure_epochs
    assert after == await keys.chain.secrets(1)
    both = await keys.rotation.rotate(make_entry(), 1, Wanted(data=True, structure=True))
    assert (list(both.data_epochs), list(both.structure_epochs)) == ([1, 2, 3], [1, 2])
    assert await keys.chain.secrets(0) != both
    await refused(ErrorCode.INVALID_ARGUMENT, keys.rotation.rotate(make_entry(), 1, Wanted(False, False)))


async def test_coordinators_rotate_no_data_key_that_a_tenant_keeps_itself(
    store: SqliteStore, clock: ManualClock
) -> None:
    keys = await open_keys(store, clock)
    item = await store.get(keyspace.tenant_record(1))
    assert item is not None
    record = parse(item, TenantRecord).message
    record.own_data_key = True
    await store.txn([], [Put(keyspace.tenant_record(1), record.SerializeToString())])
    error = await refused(ErrorCode.INVALID_ARGUMENT, keys.rotation.rotate(make_entry(), 1, DATA))
    assert "--key-file" in error.message


async def test_a_public_key_that_was_changed_in_the_store_is_found_out(store: SqliteStore, clock: ManualClock) -> None:
    await open_keys(store, clock)
    (item,) = [item async for item in each(store, keyspace.SIGNING_PREFIX)]
    wrapped = parse(item, WrappedSecret).message
    wrapped.public_key = bytes(32)
    await store.txn([], [Put(item.key, wrapped.SerializeToString())])
    await refused(ErrorCode.CORRUPT, open_keys(store, clock))
