"""What changes keys, over a store and without a coordinator around it."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.bootstrap import ClusterOptions, open_cluster
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.keys.master import FileMasterKey, MasterKeys
from holdfast_coordinator.keys.rewrap import Rewrapping
from holdfast_coordinator.keys.signing import SigningKeys
from holdfast_coordinator.keys.tenant_keys import TenantKeyRotation
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.store import MetadataStore
from tests.coordinator.rig import MASTER_KEY

_entries = itertools.count(1)


def file_key(key: bytes = MASTER_KEY) -> FileMasterKey:
    """Return a master key of a file."""
    return FileMasterKey(key, random.Random(key).randbytes)


def make_entry(action: str = "keys.rotate") -> Entry:
    """Return what the log would say of a call that changes keys."""
    number = f"{next(_entries):016x}"
    return Entry(principal="admin", tenant="default", action=action, request_id="req", entry_id=number)


@dataclass(frozen=True)
class Keys:
    """One coordinator's part in changing keys."""

    cluster_id: str
    chain: KeyChain
    signing: SigningKeys
    rotation: TenantKeyRotation
    rewrapping: Rewrapping


async def open_keys(
    store: MetadataStore, clock: ManualClock, master: MasterKeys | None = None, *, seed: int = 1
) -> Keys:
    """Open the store's cluster, made if need be, as one coordinator does."""
    master = master or MasterKeys(file_key())
    random_bytes = random.Random(seed).randbytes
    cluster = await open_cluster(
        store,
        master=master,
        options=ClusterOptions(),
        random_bytes=random_bytes,
        now_unix_ms=clock.now_unix_ms(),
    )
    chain = KeyChain(store, master, cluster.record.cluster_id, clock)
    await chain.fresh()
    ledger = Ledger(
        store,
        signer=chain.head_signer,
        clock=clock,
        random_bytes=random_bytes,
        metrics=AuditMetrics(CollectorRegistry()),
    )
    return Keys(
        cluster.record.cluster_id,
        chain,
        SigningKeys(store, chain, master, ledger, clock, random_bytes),
        TenantKeyRotation(store, chain, master, ledger, random_bytes),
        Rewrapping(store, master, ledger),
    )
