"""Every limit of Holdfast, in one place, each with its unit in its name."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

BLOCK_ID_BYTES: Final = 32

# Volumes (DESIGN section 3).
VOLUME_BLOCK_BYTES_MIN: Final = 16 * KIB
VOLUME_BLOCK_BYTES_MAX: Final = 4 * MIB
VOLUME_BLOCK_BYTES_DEFAULT: Final = 64 * KIB
VOLUME_SIZE_BYTES_MAX: Final = 64 * 1024 * GIB
VOLUMES_PER_VM_MAX: Final = 64

# What a VM carries beside its volumes. Labels are in every point's record; a definition has a key of its own.
LABELS_MAX: Final = 64
LABEL_NAME_CHARS_MAX: Final = 64
LABEL_VALUE_CHARS_MAX: Final = 256
LABELS_BYTES_MAX: Final = 4 * KIB
DEFINITION_BYTES_MAX: Final = 64 * KIB
KEEP_RULES_MAX: Final = 16
KEEP_RULES_BYTES_MAX: Final = 8 * KIB
KEEP_PATTERN_CHARS_MAX: Final = 1024
PARTITION_NUMBER_MAX: Final = 1024
READING_NOTE_CHARS_MAX: Final = 256

# Sealed blocks and batches.
PLAIN_BYTES_MAX: Final = 4 * MIB
SEALED_BYTES_MAX: Final = PLAIN_BYTES_MAX + 4 * KIB
BATCH_BYTES_TARGET: Final = 1 * MIB
BATCH_BYTES_MAX: Final = 6 * MIB
BATCH_BLOCKS_MAX: Final = 4096
IDS_PER_REQUEST_MAX: Final = 65_536
MESSAGE_BYTES_MAX: Final = 16 * MIB
IN_FLIGHT_BYTES_PER_NODE: Final = 32 * MIB

# Index trees.
TREE_FAN_OUT: Final = 128

# Names. A name is a file name too (VM/point/ below a restore directory), so it has no separators.
NAME_CHARS_MAX: Final = 128
VOLUME_NAME_CHARS_MAX: Final = 64

# Placement.
PARTITIONS_DEFAULT: Final = 4096
PARTITIONS_MAX: Final = 65_536
REPLICAS_DEFAULT: Final = 3
REPLICAS_MAX: Final = 16
NODES_MAX: Final = 65_535

# Healing (docs/healing.md).
NODE_OUT_AFTER_S: Final = 600.0
NODES_DOWN_FRACTION_MAX: Final = 1 / 3
ANTI_ENTROPY_INTERVAL_S: Final = 600.0
SCRUB_PERIOD_S: Final = 14 * 86_400.0
COLLECTION_INTERVAL_S: Final = 86_400.0
STEWARD_TTL_S: Final = 10.0
PARTITIONS_PER_COMPARISON_MAX: Final = 4096
PEER_CAPABILITY_TTL_S: Final = 900.0
RETENTION_COUNT_MAX: Final = 1_000_000
POINT_LOCK_S_MAX: Final = 100 * 366 * 86_400

# Listings.
LIST_ITEMS_MAX: Final = 1000
ERROR_BLOCK_IDS_MAX: Final = 1024

# Time.
SESSION_TTL_S: Final = 30.0
NODE_LEASE_TTL_S: Final = 10.0
HEARTBEAT_INTERVAL_S: Final = 2.0
# A principal that loses its rights keeps its access to nodes for as long as this at most.
CAPABILITY_TTL_S: Final = 900.0
CLOCK_TOLERANCE_S: Final = 120.0
RPC_TIMEOUT_S: Final = 30.0
REPLICA_SETTLE_S: Final = 10.0

# A new key signs capabilities only after all nodes have had time to learn it.
SIGNING_KEY_SPREAD_S: Final = 30.0
TOKEN_TTL_S_MAX: Final = 366 * 86_400
TOKEN_TTL_S_DEFAULT: Final = 90 * 86_400

# Access and tenants.
POLICY_BYTES_MAX: Final = 512 * KIB
POLICY_ROLES_MAX: Final = 1000
POLICY_BINDINGS_MAX: Final = 10_000
TOKENS_MAX: Final = 10_000
REVOKED_CERTIFICATES_MAX: Final = 10_000
ACCESS_TEXT_CHARS_MAX: Final = 256
TENANTS_MAX: Final = 10_000

# Audit log. A transaction of the metadata store takes 128 operations; the rest is for the log's own and usage.
AUDIT_BATCH_RECORDS_MAX: Final = 256
AUDIT_BATCH_OPERATIONS_MAX: Final = 100
AUDIT_BATCH_BYTES_MAX: Final = 512 * KIB
AUDIT_SEGMENT_RECORDS: Final = 4096
AUDIT_UNSEALED_RECORDS_MIN: Final = 4096
AUDIT_LIST_MAX: Final = 1000

# Metadata store. etcd's own defaults (128 operations, 1.5 MiB a request) are the bound of both engines.
METADATA_KEY_BYTES_MAX: Final = 1 * KIB
METADATA_VALUE_BYTES_MAX: Final = 1 * MIB
METADATA_TXN_OPERATIONS_MAX: Final = 128
METADATA_TXN_BYTES_MAX: Final = 1280 * KIB
METADATA_PREFIXES_MAX: Final = 64
METADATA_PAGE_ITEMS_MAX: Final = 10_000
METADATA_LEASE_TTL_S_MAX: Final = 86_400.0

# Share of what a change tracker calls unchanged that is compared all the same, and its bound for one volume and run.
SAMPLE_DEFAULT: Final = 0.01
SAMPLE_BYTES_MAX: Final = 16 * MIB
