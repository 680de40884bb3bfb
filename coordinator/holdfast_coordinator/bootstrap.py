"""Making a cluster, or opening the one that the metadata store holds.

Everything that is fixed for the life of a cluster is written by one transaction that holds only while there is no
cluster: of any number of coordinators that start at once, one makes it and all open the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import Stored, parse, parse_number
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets, generate_secrets, unwrap_secret, wrap_secret
from holdfast_core.model.limits import NODES_MAX, PARTITIONS_DEFAULT, PARTITIONS_MAX, REPLICAS_DEFAULT, REPLICAS_MAX
from holdfast_core.runtime.metadata.store import Absent, MetadataStore, Put
from holdfast_proto.v1.cluster_pb2 import VerifyingKey
from holdfast_proto.v1.common_pb2 import TenantKeys
from holdfast_proto.v1.records_pb2 import ClusterRecord, WrappedSecret

DEFAULT_TENANT_NAME: Final = "default"
DEFAULT_TENANT: Final = 1
METADATA_VERSION: Final = 1
# A layout is one value of the metadata store (1 MiB at most); the rest is for the names of its nodes.
OWNER_SLOTS_MAX: Final = 384 * 1024

RandomBytes = Callable[[int], bytes]


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
    """What never changes while a coordinator runs. Holds secrets, so its repr shows none of them."""

    record: ClusterRecord
    signing_key_id: str
    signing_key: bytes
    verifying_keys: tuple[VerifyingKey, ...]
    secrets: TenantSecrets

    @property
    def nodes_needed(self) -> int:
        """Nodes that must register before the first layout forms: never fewer than there are replicas."""
        return max(self.record.nodes_expected, self.record.replicas)

    def __repr__(self) -> str:
        """Name the cluster alone."""
        return f"Cluster({self.record.cluster_id})"


async def open_cluster(
    store: MetadataStore, *, master_key: bytes, options: ClusterOptions, random_bytes: RandomBytes
) -> Cluster:
    """Open the store's cluster; make it first if there is none.

    Raises:
        HoldfastError: KEY_MISMATCH if the cluster was made under another master key, with both fingerprints;
            INVALID_ARGUMENT if the options contradict the cluster or themselves; UNREACHABLE as the store.
    """
    cluster = await _read(store, master_key)
    if cluster is None:
        await _make(store, master_key, options, random_bytes)
        cluster = await _read(store, master_key)
    if cluster is None:
        raise HoldfastError(ErrorCode.CONFLICT, "the cluster vanished from the metadata store while it was made")
    _check_fits(cluster.record, options)
    return cluster


async def _read(store: MetadataStore, master_key: bytes) -> Cluster | None:
    space = keyspace.TenantKeyspace(DEFAULT_TENANT)
    name_key = keyspace.tenant_name(DEFAULT_TENANT_NAME)
    snapshot = await store.snapshot([keyspace.CLUSTER, keyspace.SIGNING_PREFIX, name_key, space.keys])
    items = {item.key: item for item in snapshot.items}
    if keyspace.CLUSTER not in items:
        return None
    record = parse(items[keyspace.CLUSTER], ClusterRecord).message
    if record.version != METADATA_VERSION:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the metadata store has version {record.version}; this coordinator knows version {METADATA_VERSION}",
        )
    if parse_number(items.get(name_key)) != DEFAULT_TENANT or space.keys not in items:
        raise HoldfastError(ErrorCode.INTERNAL, "the metadata store holds a cluster without its tenant")
    signing = [parse(item, WrappedSecret) for key, item in items.items() if key.startswith(keyspace.SIGNING_PREFIX)]
    if not signing:
        raise HoldfastError(ErrorCode.INTERNAL, "the metadata store holds a cluster without a signing key")
    private_keys = {_key_id(item): unwrap_secret(master_key, item.message, _signing(_key_id(item))) for item in signing}
    tenant_keys = TenantKeys()
    tenant_keys.ParseFromString(
        unwrap_secret(master_key, parse(items[space.keys], WrappedSecret).message, _tenant(DEFAULT_TENANT))
    )
    newest = _key_id(max(signing, key=lambda item: item.create_revision))
    return Cluster(
        record=record,
        signing_key_id=newest,
        signing_key=private_keys[newest],
        verifying_keys=tuple(
            VerifyingKey(key_id=key_id, public_key=_public_key(private)) for key_id, private in private_keys.items()
        ),
        secrets=TenantSecrets.from_message(tenant_keys),
    )


async def _make(store: MetadataStore, master_key: bytes, options: ClusterOptions, random_bytes: RandomBytes) -> None:
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
    signing_key = random_bytes(32)
    key_id = blake3(_public_key(signing_key)).hexdigest(length=8)
    secrets = generate_secrets(DEFAULT_TENANT, random_bytes)
    wrapped_signing_key = wrap_secret(master_key, signing_key, _signing(key_id), random_bytes(24))
    wrapped_secrets = wrap_secret(
        master_key, secrets.to_message().SerializeToString(), _tenant(DEFAULT_TENANT), random_bytes(24)
    )
    await store.txn(
        [Absent(keyspace.CLUSTER)],
        [
            Put(keyspace.CLUSTER, record.SerializeToString()),
            Put(keyspace.signing_key(key_id), wrapped_signing_key.SerializeToString()),
            Put(keyspace.tenant_name(DEFAULT_TENANT_NAME), str(DEFAULT_TENANT).encode()),
            Put(keyspace.TenantKeyspace(DEFAULT_TENANT).keys, wrapped_secrets.SerializeToString()),
        ],
    )


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


def _public_key(private_key: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def _key_id(item: Stored[WrappedSecret]) -> str:
    return item.key.removeprefix(keyspace.SIGNING_PREFIX)


def _signing(key_id: str) -> str:
    """Purpose under which a signing key is wrapped: a wrapped secret opens only as what it is."""
    return f"signing/{key_id}"


def _tenant(tenant: int) -> str:
    """Purpose under which a tenant's secrets are wrapped."""
    return f"tenant/{tenant}"
