"""Making a cluster, or opening the one that the metadata store holds.

Everything that is fixed for the life of a cluster is written by one transaction that holds only while there is no
cluster: of any number of coordinators that start at once, one makes it and all open the same. What an older version
did not write yet is added in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.collection.epochs import EPOCH_FIRST
from holdfast_coordinator.keys.chain import audit_purpose, signing_purpose, tenant_purpose
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.keys.signing import new_signing_key
from holdfast_coordinator.records import parse, parse_number
from holdfast_coordinator.transactions import ATTEMPTS_MAX, attempt, contention
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import generate_secrets
from holdfast_core.model.limits import NODES_MAX, PARTITIONS_DEFAULT, PARTITIONS_MAX, REPLICAS_DEFAULT, REPLICAS_MAX
from holdfast_core.runtime.metadata.store import Absent, KeyValue, MetadataStore, Put
from holdfast_proto.v1.records_pb2 import ClusterRecord, WrappedSecret
from holdfast_proto.v1.tenants_pb2 import Quota, TenantRecord

DEFAULT_TENANT_NAME: Final = "default"
DEFAULT_TENANT: Final = 1
# The cluster's own: old segments of its audit log are sealed with its keys. No caller can name it.
SYSTEM_TENANT: Final = 0
METADATA_VERSION: Final = 1
# A layout is one value of the metadata store (1 MiB at most); the rest is for the names of its nodes.
OWNER_SLOTS_MAX: Final = 384 * 1024

RandomBytes = Callable[[int], bytes]
_Items = Mapping[str, KeyValue]


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What an operator said of the cluster; None where nothing was said.

    Attributes:
        nodes_expected: nodes that must register before the first layout forms; matters until it has.
        replicas: owners a partition has; fixed when the cluster is made.
        partitions: a power of two; fixed when the cluster is made.
    """

    nodes_expected: int | None = None
    replicas: int | None = None
    partitions: int | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """What never changes while a cluster lives."""

    record: ClusterRecord

    @property
    def nodes_needed(self) -> int:
        """Nodes that must register before the first layout forms: never fewer than there are replicas."""
        return max(self.record.nodes_expected, self.record.replicas)


async def open_cluster(
    store: MetadataStore,
    *,
    master: MasterKeys,
    options: ClusterOptions,
    random_bytes: RandomBytes,
    now_unix_ms: int,
) -> Cluster:
    """Open the store's cluster; make it first if there is none.

    Raises:
        HoldfastError: KEY_MISMATCH if the cluster was made under another master key, with both fingerprints;
            INVALID_ARGUMENT if the options contradict the cluster or themselves; UNREACHABLE as the store.
    """
    name_key = keyspace.tenant_name(DEFAULT_TENANT_NAME)
    keys = (_tenant_keys(DEFAULT_TENANT), _tenant_keys(SYSTEM_TENANT))
    prefixes = [keyspace.CLUSTER, keyspace.SIGNING_PREFIX, keyspace.AUDIT_KEYS_PREFIX, name_key, *keys]
    prefixes += [keyspace.tenant_record(DEFAULT_TENANT), keyspace.tenant_record(SYSTEM_TENANT)]
    prefixes += [keyspace.COLLECTION_EPOCH]
    for _ in range(ATTEMPTS_MAX):
        items = {item.key: item for item in (await store.snapshot(prefixes)).items}
        maker = _Maker(items, master, random_bytes, now_unix_ms)
        if keyspace.CLUSTER in items:
            await _check_whole(items, master)
        else:
            await maker.make_cluster(options)
        await maker.complete()
        if not maker.puts:
            record = parse(items[keyspace.CLUSTER], ClusterRecord).message
            _check_fits(record, options)
            return Cluster(record)
        await attempt(store, [Absent(put.key) for put in maker.puts], maker.puts)
    raise contention("the making of the cluster")


class _Maker:
    """Collects what is to be written."""

    def __init__(self, items: _Items, master: MasterKeys, random_bytes: RandomBytes, now_unix_ms: int) -> None:
        self.puts: list[Put] = []
        self._items = items
        self._master = master
        self._random_bytes = random_bytes
        self._now_unix_ms = now_unix_ms

    async def make_cluster(self, options: ClusterOptions) -> None:
        """Add what makes a new cluster."""
        self.puts.append(Put(keyspace.CLUSTER, _new_record(options, self._random_bytes).SerializeToString()))
        await self._add_signing_key(keyspace.SIGNING_PREFIX, signing_purpose)
        self.puts.append(Put(keyspace.tenant_name(DEFAULT_TENANT_NAME), str(DEFAULT_TENANT).encode()))
        await self._add_tenant_keys(DEFAULT_TENANT)

    async def complete(self) -> None:
        """Add what every cluster has and this one lacks."""
        if not any(key.startswith(keyspace.AUDIT_KEYS_PREFIX) for key in self._items):
            await self._add_signing_key(keyspace.AUDIT_KEYS_PREFIX, audit_purpose)
        if _tenant_keys(SYSTEM_TENANT) not in self._items:
            await self._add_tenant_keys(SYSTEM_TENANT)
        if keyspace.COLLECTION_EPOCH not in self._items:
            self.puts.append(Put(keyspace.COLLECTION_EPOCH, str(EPOCH_FIRST).encode()))
        for tenant, name in ((SYSTEM_TENANT, ""), (DEFAULT_TENANT, DEFAULT_TENANT_NAME)):
            key = keyspace.tenant_record(tenant)
            if key not in self._items:
                record = TenantRecord(tenant=tenant, name=name, quota=Quota(), created_unix_ms=self._now_unix_ms)
                self.puts.append(Put(key, record.SerializeToString()))

    async def _add_signing_key(self, prefix: str, purpose: Callable[[str], str]) -> None:
        made = await new_signing_key(self._master, purpose, self._random_bytes)
        self.puts.append(Put(prefix + made.key_id, made.wrapped.SerializeToString()))

    async def _add_tenant_keys(self, tenant: int) -> None:
        secrets = generate_secrets(tenant, self._random_bytes).to_message().SerializeToString()
        wrapped = await self._master.wrap(secrets, tenant_purpose(tenant))
        self.puts.append(Put(_tenant_keys(tenant), wrapped.SerializeToString()))


async def _check_whole(items: _Items, master: MasterKeys) -> None:
    """Check that what a cluster cannot do without is there and opens under the master key."""
    record = parse(items[keyspace.CLUSTER], ClusterRecord).message
    if record.version != METADATA_VERSION:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the metadata store has version {record.version}; this coordinator knows version {METADATA_VERSION}",
        )
    name_key = keyspace.tenant_name(DEFAULT_TENANT_NAME)
    if parse_number(items.get(name_key)) != DEFAULT_TENANT or _tenant_keys(DEFAULT_TENANT) not in items:
        raise HoldfastError(ErrorCode.INTERNAL, "the metadata store holds a cluster without its tenant")
    signing = [item for key, item in items.items() if key.startswith(keyspace.SIGNING_PREFIX)]
    if not signing:
        raise HoldfastError(ErrorCode.INTERNAL, "the metadata store holds a cluster without a signing key")
    for item in signing:
        key_id = item.key.removeprefix(keyspace.SIGNING_PREFIX)
        await master.unwrap(parse(item, WrappedSecret).message, signing_purpose(key_id))
    wrapped = parse(items[_tenant_keys(DEFAULT_TENANT)], WrappedSecret).message
    await master.unwrap(wrapped, tenant_purpose(DEFAULT_TENANT))


def _tenant_keys(tenant: int) -> str:
    return keyspace.TenantKeyspace(tenant).keys


def _new_record(options: ClusterOptions, random_bytes: RandomBytes) -> ClusterRecord:
    replicas = REPLICAS_DEFAULT if options.replicas is None else options.replicas
    record = ClusterRecord(
        cluster_id=random_bytes(16).hex(),
        seed=int.from_bytes(random_bytes(4), "little"),
        partitions=PARTITIONS_DEFAULT if options.partitions is None else _checked_partitions(options.partitions),
        replicas=_checked_count(replicas, "replicas", REPLICAS_MAX),
        nodes_expected=_checked_count(
            replicas if options.nodes_expected is None else options.nodes_expected, "nodes", NODES_MAX
        ),
        version=METADATA_VERSION,
    )
    if record.partitions * record.replicas > OWNER_SLOTS_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"{record.partitions} partitions of {record.replicas} replicas are too many for one layout; "
            f"their product may be {OWNER_SLOTS_MAX} at most",
        )
    return record


def _check_fits(record: ClusterRecord, options: ClusterOptions) -> None:
    for name, said, made in (
        ("replicas", options.replicas, record.replicas),
        ("partitions", options.partitions, record.partitions),
    ):
        if said is not None and said != made:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"the cluster was made with {name}={made}, which stays for its life; leave the option out, "
                f"or make another cluster for {name}={said}",
            )


def _checked_count(count: int, what: str, most: int) -> int:
    if not 1 <= count <= most:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{count} {what} make no cluster; 1 to {most} are allowed")
    return count


def _checked_partitions(partitions: int) -> int:
    if not 1 <= partitions <= PARTITIONS_MAX or partitions & (partitions - 1):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{partitions} is not a number of partitions; a power of two up to {PARTITIONS_MAX} is",
        )
    return partitions
