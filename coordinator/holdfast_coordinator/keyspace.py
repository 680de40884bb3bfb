"""Every key of the metadata store, in one place. Docs: `docs/adr/0040-metadata-keys.md`.

Values are messages of `records.proto` or `common.proto` unless the table says otherwise. T is a tenant's number in ten
digits, so that keys sort by it; names and ids hold no slash (`holdfast_core.model.names`), so parts never run together.

| key below `holdfast/v1/` | value | lease |
| --- | --- | --- |
| `cluster` | ClusterRecord | |
| `signing/KEY-ID` | WrappedSecret of an Ed25519 private key | |
| `tenant-names/NAME` | the tenant's number in decimal | |
| `tenant-numbers` | decimal number of the newest tenant | |
| `tenants/T` | TenantRecord; tenant 0 is the cluster's own, 1 is `default` | |
| `access/policy` | the policy: a JSON document in UTF-8 | |
| `access/tokens/TOKEN` | TokenRecord | |
| `access/revoked/FINGERPRINT` | RevokedCertificate; SHA-256 of the certificate in hexadecimal | |
| `audit/head` | AuditHead; a condition and an operation of every append | |
| `audit/head/turn` | name of the ledger that claims the next append | |
| `audit/batches/FIRST` | AuditBatch; FIRST is the sequence number of its first record, in sixteen digits | |
| `audit/segments/FIRST` | AuditSegment, whose block collection must keep | |
| `audit/keys/KEY-ID` | WrappedSecret of an Ed25519 private key that signs heads; never deleted | |
| `collection-epoch` | decimal; absent means 1, the first | |
| `layout/head` | decimal epoch of the newest layout; its revision is the revision of the whole layout set | |
| `layout/epochs/EPOCH` | Layout, one key a living epoch | |
| `node/records/NODE` | NodeRecord | |
| `node/status/NODE` | NodeStatus of the last heartbeat, without `up` | |
| `node/leases/NODE` | empty; alive while the node is up | node |
| `node/states/NODE` | NodeState: what the operator and the steward decided of it; absent for nothing | |
| `layout/grant` | GrantRecord; written by the transaction that ends older epochs | |
| `layout-history/EPOCH` | LayoutChange | |
| `steward` | name of the coordinator that is steward | steward |
| `duties/DUTY` | decimal Unix time of its last run, milliseconds | |
| `collection/running` | CollectionReport of the collection under way | collector |
| `collection/last` | CollectionReport of the last one | |
| `collection/planned` | CollectionReport of the last dry run | |
| `t/T/keys` | WrappedSecret of TenantKeys | |
| `t/T/usage` | Usage; absent until the first change | |
| `t/T/vms/VM` | VmRecord, without the definition | |
| `t/T/definitions/vms/VM` | the VM's definition, as it was given; absent for none | |
| `t/T/definitions/points/POINT` | the definition of the point, or of the open session; absent for none | session |
| `t/T/discards/VM` | DiscardVmResponse: what is done so far, then the receipt | a day, once it is the receipt |
| `t/T/points/VM/NUMBER` | PointRecord; NUMBER in twelve digits, so that a VM's points are one range, oldest first | |
| `t/T/point-ids/POINT` | `VM/NUMBER` | |
| `t/T/point-numbers/VM` | decimal number of the VM's newest point | |
| `t/T/objects/TASK/TIME.OBJECT` | ObjectRecord; TIME in fifteen digits of milliseconds | |
| `t/T/object-ids/OBJECT` | `TASK/TIME.OBJECT` | |
| `t/T/sessions/SESSION` | SessionRecord | session |
| `t/T/vm-sessions/VM` | id of the session that holds the VM | session |
| `t/T/locks/POINT` | LockRecord | |
| `t/T/damage/ids/BLOCK` | id of the point or object that was being read; BLOCK in hexadecimal | |
| `t/T/damage/head` | empty; written with every change of `damage/ids`, so that one condition covers them all | |
"""

from __future__ import annotations

from typing import Final

_ROOT: Final = "holdfast/v1/"

CLUSTER: Final = _ROOT + "cluster"
SIGNING_PREFIX: Final = _ROOT + "signing/"
TENANT_NUMBERS: Final = _ROOT + "tenant-numbers"
TENANTS_PREFIX: Final = _ROOT + "tenants/"
ACCESS_PREFIX: Final = _ROOT + "access/"
ACCESS_POLICY: Final = ACCESS_PREFIX + "policy"
TOKENS_PREFIX: Final = ACCESS_PREFIX + "tokens/"
REVOKED_PREFIX: Final = ACCESS_PREFIX + "revoked/"
AUDIT_PREFIX: Final = _ROOT + "audit/"
AUDIT_HEAD: Final = AUDIT_PREFIX + "head"
AUDIT_TURN: Final = AUDIT_HEAD + "/turn"
AUDIT_BATCHES_PREFIX: Final = AUDIT_PREFIX + "batches/"
AUDIT_SEGMENTS_PREFIX: Final = AUDIT_PREFIX + "segments/"
AUDIT_KEYS_PREFIX: Final = AUDIT_PREFIX + "keys/"
COLLECTION_EPOCH: Final = _ROOT + "collection-epoch"
COLLECTION_RUNNING: Final = _ROOT + "collection/running"
COLLECTION_LAST: Final = _ROOT + "collection/last"
COLLECTION_PLANNED: Final = _ROOT + "collection/planned"
STEWARD: Final = _ROOT + "steward"
DUTIES_PREFIX: Final = _ROOT + "duties/"
LAYOUT_PREFIX: Final = _ROOT + "layout/"
LAYOUT_HEAD: Final = LAYOUT_PREFIX + "head"
LAYOUT_EPOCHS_PREFIX: Final = LAYOUT_PREFIX + "epochs/"
LAYOUT_GRANT: Final = LAYOUT_PREFIX + "grant"
LAYOUT_HISTORY_PREFIX: Final = _ROOT + "layout-history/"
NODE_PREFIX: Final = _ROOT + "node/"
NODE_RECORDS_PREFIX: Final = NODE_PREFIX + "records/"
NODE_STATUS_PREFIX: Final = NODE_PREFIX + "status/"
NODE_LEASES_PREFIX: Final = NODE_PREFIX + "leases/"
NODE_STATES_PREFIX: Final = NODE_PREFIX + "states/"


def signing_key(key_id: str) -> str:
    """Key of one wrapped signing key."""
    return SIGNING_PREFIX + key_id


def tenant_name(name: str) -> str:
    """Key that maps a tenant's name to its number."""
    return f"{_ROOT}tenant-names/{name}"


def tenant_record(tenant: int) -> str:
    """Key of a tenant's record."""
    return f"{TENANTS_PREFIX}{tenant:010d}"


def token(token_id: str) -> str:
    """Key of an API token's record."""
    return TOKENS_PREFIX + token_id


def revoked(fingerprint: bytes) -> str:
    """Key that marks a certificate as refused; `fingerprint` is the SHA-256 of its DER form."""
    return REVOKED_PREFIX + fingerprint.hex()


def audit_batch(first: int) -> str:
    """Key of the batch whose first record has this sequence number."""
    return f"{AUDIT_BATCHES_PREFIX}{first:016d}"


def audit_segment(first: int) -> str:
    """Key of the sealed segment whose first record has this sequence number."""
    return f"{AUDIT_SEGMENTS_PREFIX}{first:016d}"


def audit_key(key_id: str) -> str:
    """Key of a wrapped key that signs heads of the log."""
    return AUDIT_KEYS_PREFIX + key_id


def layout_epoch(epoch: int) -> str:
    """Key of one living layout."""
    return f"{LAYOUT_EPOCHS_PREFIX}{epoch:020d}"


def node_record(node_id: str) -> str:
    """Key of a node's registration."""
    return NODE_RECORDS_PREFIX + node_id


def node_status(node_id: str) -> str:
    """Key of a node's last status."""
    return NODE_STATUS_PREFIX + node_id


def node_lease(node_id: str) -> str:
    """Key that lives while the node is up."""
    return NODE_LEASES_PREFIX + node_id


def node_state(node_id: str) -> str:
    """Key of what was decided of a node."""
    return NODE_STATES_PREFIX + node_id


def layout_history(epoch: int) -> str:
    """Key of the account of how one layout came."""
    return f"{LAYOUT_HISTORY_PREFIX}{epoch:020d}"


def duty(name: str) -> str:
    """Key of when a duty was last run."""
    return DUTIES_PREFIX + name


class TenantKeyspace:
    """Keys of one tenant; no key of another tenant can be made with it."""

    def __init__(self, tenant: int) -> None:
        """Take the tenant's number."""
        self.tenant: Final = tenant
        root = f"{_ROOT}t/{tenant:010d}/"
        self.keys: Final = root + "keys"
        self.usage: Final = root + "usage"
        self.vms_prefix: Final = root + "vms/"
        self.vm_definitions_prefix: Final = root + "definitions/vms/"
        self.point_definitions_prefix: Final = root + "definitions/points/"
        self.discards_prefix: Final = root + "discards/"
        self.points_prefix: Final = root + "points/"
        self.point_ids_prefix: Final = root + "point-ids/"
        self.objects_prefix: Final = root + "objects/"
        self.object_ids_prefix: Final = root + "object-ids/"
        self.sessions_prefix: Final = root + "sessions/"
        self.locks_prefix: Final = root + "locks/"
        self.damage_ids_prefix: Final = root + "damage/ids/"
        self.damage_head: Final = root + "damage/head"
        self._point_numbers: Final = root + "point-numbers/"
        self._vm_sessions: Final = root + "vm-sessions/"

    def vm(self, vm_id: str) -> str:
        """Key of a VM's registration."""
        return self.vms_prefix + vm_id

    def vm_definition(self, vm_id: str) -> str:
        """Key of a VM's definition."""
        return self.vm_definitions_prefix + vm_id

    def point_definition(self, point_id: str) -> str:
        """Key of the definition that a point has, or the session that makes it."""
        return self.point_definitions_prefix + point_id

    def discard(self, vm_id: str) -> str:
        """Key of what is done of a VM's discarding, and then of its receipt."""
        return self.discards_prefix + vm_id

    def points_of(self, vm_id: str) -> str:
        """Prefix of a VM's points, oldest first."""
        return f"{self.points_prefix}{vm_id}/"

    def point(self, place: str) -> str:
        """Key of a point's record, from what its `point_id` key holds."""
        return self.points_prefix + place

    def point_id(self, point_id: str) -> str:
        """Key that says where a point's record is."""
        return self.point_ids_prefix + point_id

    def point_number(self, vm_id: str) -> str:
        """Key of the number of a VM's newest point."""
        return self._point_numbers + vm_id

    def objects_of(self, task_id: str) -> str:
        """Prefix of a task's objects, oldest first."""
        return f"{self.objects_prefix}{task_id}/"

    def object(self, place: str) -> str:
        """Key of an object's record, from what its `object_id` key holds."""
        return self.objects_prefix + place

    def object_id(self, storage_id: str) -> str:
        """Key that says where an object's record is."""
        return self.object_ids_prefix + storage_id

    def session(self, session_id: str) -> str:
        """Key of an open session."""
        return self.sessions_prefix + session_id

    def vm_session(self, vm_id: str) -> str:
        """Key that names the session holding a VM."""
        return self._vm_sessions + vm_id

    def lock(self, point_id: str) -> str:
        """Key of a point's lock."""
        return self.locks_prefix + point_id

    def damaged_block(self, block_id: bytes) -> str:
        """Key that marks a block as lost."""
        return self.damage_ids_prefix + block_id.hex()


def point_place(vm_id: str, number: int) -> str:
    """Where a point's record is: the value of its `point_id` key."""
    return f"{vm_id}/{number:012d}"


def object_place(task_id: str, created_unix_ms: int, storage_id: str) -> str:
    """Where an object's record is: the value of its `object_id` key."""
    return f"{task_id}/{created_unix_ms:015d}.{storage_id}"
