"""Master keys: which one opens what, what is said of a wrong one, and how another takes its place."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.keys.tenant_keys import Wanted
from holdfast_coordinator.master_key import MASTER_KEY_FILE, open_master_keys
from holdfast_coordinator.records import parse
from holdfast_core.model.audit.record import REPEATED
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets, master_fingerprint
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import KeyValue, Put
from holdfast_proto.v1.records_pb2 import WrappedSecret
from holdfast_proto.v1.tenants_pb2 import TenantRecord
from tests.coordinator.faults import Crash, Fault, FaultyStore
from tests.coordinator.key_rig import Keys, file_key, make_entry, open_keys
from tests.coordinator.rig import MASTER_KEY, refused

NEW_KEY = bytes(reversed(MASTER_KEY))
OLD, NEW = master_fingerprint(MASTER_KEY), master_fingerprint(NEW_KEY)


def both() -> MasterKeys:
    return MasterKeys(file_key(NEW_KEY), [file_key(MASTER_KEY)])


async def everything(store: SqliteStore) -> dict[str, KeyValue]:
    return {item.key: item for item in (await store.snapshot([""])).items}


async def secrets_of(keys: Keys, tenants: int) -> tuple[list[str], list[TenantSecrets]]:
    names = [key.key_id for key in (*keys.chain.signing_keys(), *keys.chain.audit_keys_held())]
    return names, [await keys.chain.secrets(tenant) for tenant in range(tenants)]


async def add_tenants(store: SqliteStore, keys: Keys, count: int) -> None:
    """Add tenants, so that one transaction cannot hold the secrets of all."""
    for tenant in range(2, count):
        keyed = await file_key().wrap(
            (await keys.chain.secrets(1)).to_message().SerializeToString(), f"tenant/{tenant}"
        )
        record = TenantRecord(tenant=tenant, name=f"tenant-{tenant}")
        await store.txn(
            [],
            [
                Put(keyspace.TenantKeyspace(tenant).keys, keyed.SerializeToString()),
                Put(keyspace.tenant_record(tenant), record.SerializeToString()),
            ],
        )


@pytest.mark.parametrize(("fault", "at"), [(None, 0), *((fault, at) for fault in Fault for at in (6, 10, 13))])
async def test_a_new_master_key_wraps_all_secrets_and_nothing_else_changes(
    store: SqliteStore, clock: ManualClock, fault: Fault | None, at: int
) -> None:
    keys = await open_keys(store, clock)
    await keys.signing.rotate_capability(make_entry())
    await keys.signing.rotate_audit(make_entry())
    await keys.rotation.rotate(make_entry(), 1, Wanted(data=True, structure=False))
    await add_tenants(store, keys, 40)
    held = await secrets_of(keys, 40)
    before = await everything(store)

    faults = FaultyStore(store)
    interrupted = await open_keys(faults, clock, both())
    faults.arm(fault, at=at)
    (outcome,) = await asyncio.gather(interrupted.rewrapping.run(make_entry("keys.admin")), return_exceptions=True)
    assert outcome == 44 if fault is None else isinstance(outcome, int | Crash | HoldfastError)
    changing = await open_keys(store, clock, both())
    await changing.rewrapping.run(make_entry("keys.admin"))
    assert await changing.rewrapping.wrapped_by() == {NEW.hex(): 44}

    after = await everything(store)
    changed = {key for key, item in after.items() if key not in before or before[key].value != item.value}
    kept = (keyspace.SIGNING_PREFIX, keyspace.AUDIT_PREFIX)
    assert all(key.startswith(kept) or key.endswith("/keys") for key in changed)
    for key in changed & before.keys() - {keyspace.AUDIT_HEAD}:
        old, new = parse(before[key], WrappedSecret).message, parse(after[key], WrappedSecret).message
        assert (old.master_fingerprint, new.master_fingerprint) == (OLD, NEW)
        assert (old.created_unix_ms, old.public_key) == (new.created_unix_ms, new.public_key)
    assert await secrets_of(await open_keys(store, clock, MasterKeys(file_key(NEW_KEY))), 40) == held

    again = make_entry("keys.admin")
    assert (await changing.rewrapping.run(again), again.outcome) == (0, REPEATED)


async def test_the_old_master_key_is_refused_and_the_expected_one_named(store: SqliteStore, clock: ManualClock) -> None:
    await open_keys(store, clock)
    await (await open_keys(store, clock, both())).rewrapping.run(make_entry())
    error = await refused(ErrorCode.KEY_MISMATCH, open_keys(store, clock))
    assert error.facts == {"expected": NEW.hex(), "given": OLD.hex()}
    assert NEW.hex() in error.message


async def test_a_running_coordinator_without_the_new_key_goes_on(store: SqliteStore, clock: ManualClock) -> None:
    old = await open_keys(store, clock)
    signing = old.chain.signing_keys()
    await (await open_keys(store, clock, both())).rewrapping.run(make_entry())
    await old.chain.fresh()
    assert old.chain.signing_keys() == signing


def opened(named: str | None = None, old: str | None = None, **changes: Any) -> MasterKeys:
    options: dict[str, Any] = {
        "data": None,
        "create": False,
        "has_metadata": False,
        "random_bytes": random.Random(1).randbytes,
        "environment": {},
    }
    return open_master_keys(named, old, **(options | changes))


def test_where_master_keys_are_looked_for(tmp_path: Path) -> None:
    first, second = tmp_path / "one.key", tmp_path / "two.key"
    first.write_bytes(MASTER_KEY)
    second.write_text(NEW_KEY.hex() + "\n")
    assert opened(str(first)).fingerprint == OLD
    assert opened(str(second), f"{first}, {second},").fingerprint == NEW
    (tmp_path / MASTER_KEY_FILE).write_bytes(NEW_KEY)
    assert opened(data=tmp_path).fingerprint == NEW
    assert opened(str(first), data=tmp_path).fingerprint == OLD
    made = opened(str(tmp_path / "deep" / "new.key"), create=True)
    assert opened(str(tmp_path / "deep" / "new.key")).fingerprint == made.fingerprint
    assert opened("vault:https://vault.example:8200/transit/holdfast", str(first)).fingerprint not in (OLD, NEW)


@pytest.mark.parametrize(
    ("code", "arguments", "changes"),
    [
        (ErrorCode.INVALID_ARGUMENT, (), {}),
        (ErrorCode.NOT_FOUND, ("none.key",), {}),
        (ErrorCode.NOT_FOUND, ("none.key",), {"create": True, "has_metadata": True}),
        (ErrorCode.NOT_FOUND, ("one.key", "none.key"), {"create": True}),
        (ErrorCode.INVALID_ARGUMENT, ("short.key",), {}),
        (ErrorCode.INVALID_ARGUMENT, ("vault:https://host",), {}),
        (ErrorCode.INVALID_ARGUMENT, ("vault:http://10.1.2.3:8200/transit/key",), {}),
        (
            ErrorCode.INVALID_ARGUMENT,
            ("vault:https://host/transit/key",),
            {"environment": {"VAULT_CACERT": "none.pem"}},
        ),
    ],
)
def test_what_names_no_master_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: ErrorCode,
    arguments: tuple[str, ...],
    changes: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.key").write_bytes(MASTER_KEY)
    Path("short.key").write_bytes(b"short")
    with pytest.raises(HoldfastError) as caught:
        opened(*arguments, **changes)
    assert caught.value.code is code


def test_the_service_does_not_start_with_a_wrong_master_key_and_names_the_right_one(tmp_path: Path) -> None:
    async def make() -> None:
        store = await SqliteStore.open(tmp_path / "metadata.sqlite", ManualClock())
        await open_keys(store, ManualClock())
        await store.close()

    asyncio.run(make())
    wrong = tmp_path / "wrong.key"
    wrong.write_bytes(NEW_KEY)
    options = ["coordinator", "--data", str(tmp_path), "--bind", "127.0.0.1:0", "--master-key", str(wrong)]
    command = [sys.executable, "-m", "holdfast.cli.main", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (7, "")
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("holdfast: ")]
    assert OLD.hex() in said
    assert NEW.hex() in said
