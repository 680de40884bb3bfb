"""What must always hold, looked at from above, at the very moment of every event that could break it.

It sees the metadata store's transactions as they are applied and the disks as they change, asks nobody, and costs the
actors nothing. What faults destroyed within the promise is on record (`spoil`), and counts as held; so a block is
missed only if the product lost it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.bootstrap import SYSTEM_TENANT
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import parse
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.audit.record import OK, AuditRecord
from holdfast_core.model.layout import Layout
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.metadata.store import KeyValue, WatchBatch
from holdfast_proto.v1 import common_pb2
from holdfast_proto.v1.audit_pb2 import AuditBatch
from holdfast_proto.v1.records_pb2 import GrantRecord, ObjectRecord, PointRecord, SessionRecord
from tests.sim.disk import Copy
from tests.sim.metadata import MetadataTables
from tests.sim.nodes import NodeHost
from tests.sim.oracle import Oracle, Ref
from tests.sim.reach import Reach
from tests.sim.world import World

_VIOLATIONS_MAX: Final = 20
# How old an owner's confirmation may be when a drop that relies on it is carried out.
_CONFIRMED_S: Final = 20.0


class Checker:
    """Watches one history. `violations` says what broke, invariant first."""

    def __init__(
        self,
        world: World,
        tables: MetadataTables,
        nodes: Mapping[str, NodeHost],
        oracle: Oracle,
        *,
        tenants: Iterable[int],
    ) -> None:
        """Begin to watch; `nodes` may grow."""
        self.violations: list[str] = []
        self.spoilt: dict[Ref, dict[str, None]] = {}
        self.reach = Reach(oracle)
        self._world = world
        self._tables = tables
        self._nodes = nodes
        self._oracle = oracle
        self._tenants = {space.points_prefix.rpartition("points/")[0]: space for space in map(TenantKeyspace, tenants)}
        self._held_by: dict[Ref, int] = {}
        self._records: dict[str, tuple[bytes, ...]] = {}
        self._sessions: dict[str, tuple[int, frozenset[Ref]]] = {}
        self._living: tuple[Layout, ...] = ()
        self._layouts: dict[int, Layout] = {}
        self._grants: dict[int, None] = {}
        self._collected: dict[tuple[str, Ref], float] = {}
        self._lost: dict[tuple[str, Ref], float] = {}
        tables.observers.append(self._changed)

    def violate(self, invariant: int, what: str) -> None:
        """Note that an invariant of docs/invariants.md is broken; 0 stands for what every program promises."""
        if len(self.violations) < _VIOLATIONS_MAX:
            self.violations.append(f"invariant {invariant}: {what} (at {self._world.loop.time():.3f} s)")
            self._world.note("checker", f"invariant {invariant}: {what}")

    # What blocks are for, and where they are.

    def referenced(self, ref: Ref) -> bool:
        """Whether a visible point or object reaches the block, or an open session pins it or leans on it."""
        if ref in self._held_by:
            return True
        return any(
            ref in pinned or ref in self._oracle.leaning.get(session_id, {})
            for session_id, (_, pinned) in self._sessions.items()
        )

    def all_referenced(self) -> list[Ref]:
        """Return every block that is referenced now, in order."""
        refs = set(self._held_by)
        for session_id, (_, pinned) in self._sessions.items():
            refs |= pinned
            refs.update(self._oracle.leaning.get(session_id, {}))
        return sorted(refs)

    def reached(self) -> frozenset[Ref]:
        """Return every block that visible points and objects reach."""
        return frozenset(self._held_by)

    @property
    def open_sessions(self) -> tuple[str, ...]:
        """Ids of the sessions that are open now."""
        return tuple(self._sessions)

    @property
    def visible(self) -> dict[str, str]:
        """Places of visible points and objects by id."""
        return {place.rpartition("#")[2]: place for place in self._records}

    @property
    def living(self) -> tuple[Layout, ...]:
        """The living layouts, newest first."""
        return self._living

    def intact(self, node_id: str, ref: Ref) -> bool:
        """Whether a node's disk has the right bytes of a block, as a copy that it would serve."""
        copy = self._copy(node_id, ref)
        return copy is not None and not copy.aside and copy.data == self._oracle.bodies[ref].data

    def _has_copy(self, node_id: str, ref: Ref) -> bool:
        return self._copy(node_id, ref) is not None

    def _copy(self, node_id: str, ref: Ref) -> Copy | None:
        host = self._nodes.get(node_id)
        if host is None or not self._living:
            return None
        return host.disk.find(self._living[0].partition_of(ref[1]), ref)

    def durable(self, ref: Ref) -> bool:
        """Whether W owners of one living epoch have a block, those counted whose copies were destroyed on purpose."""
        spoilt = self.spoilt.get(ref, {})
        for layout in self._living:
            owners = layout.owners_of_block(ref[1])
            if sum(owner in spoilt or self.intact(owner, ref) for owner in owners) >= layout.write_quorum:
                return True
        return False

    def whole(self, ref: Ref) -> bool:
        """Whether every owner of the newest epoch has a block."""
        return all(self.intact(owner, ref) for owner in self._living[0].owners_of_block(ref[1]))

    def spoil(self, node_id: str, ref: Ref) -> None:
        """Put on record that a fault destroys a node's copy of a block."""
        self.spoilt.setdefault(ref, {})[node_id] = None

    def lose(self, node_id: str, ref: Ref) -> None:
        """Put on record that a node's good copy of a block is lost together with its disk."""
        self.spoil(node_id, ref)
        self._lost[node_id, ref] = self._world.loop.time()

    def forgive(self) -> None:
        """Take off the record what has been made good: copies that are whole again, or gone without being missed.

        A rotten copy stays on it, wherever it is: until a scrub finds it, its node will say that it has the block.
        """
        for ref, nodes in list(self.spoilt.items()):
            settled = not self.referenced(ref) or self.whole(ref)
            for node_id in list(nodes):
                if self.intact(node_id, ref) or (settled and not self._has_copy(node_id, ref)):
                    del nodes[node_id]
            if not nodes:
                del self.spoilt[ref]

    # Events on disks.

    def deleted(self, node_id: str, ref: Ref, cutoff: int | None) -> None:
        """A node has removed its copy of a block: for a collection if there is a cut-off, else as foreign."""
        if cutoff is None:
            self._check_drop(node_id, ref)
        else:
            self._collected[node_id, ref] = self._world.loop.time()
        if self.referenced(ref) and not self.durable(ref):
            why = "dropped" if cutoff is None else f"deleted below {cutoff}"
            self.violate(3, f"{_name(ref)}, which is referenced, is not durable once {node_id} has {why} it")

    def leaned(self, session_id: str, ref: Ref) -> None:
        """A session was told that a block is durable."""
        if session_id in self._sessions and not self.durable(ref):
            self.violate(4, f"{session_id} was told that {_name(ref)} is durable, and it is not")

    def stamped_back(self, node_id: str, ref: Ref, before: int, now: int) -> None:
        """A copy counts as stamped with less than it did."""
        self.violate(3, f"the stamp of {_name(ref)} on {node_id} went from {before} to {now}")

    def check_all(self) -> None:
        """Check that everything that is referenced is durable."""
        for ref in self.all_referenced():
            if not self.durable(ref):
                self.violate(1, f"{_name(ref)}, which is referenced, is not durable")

    def check_acknowledged(self) -> None:
        """Check that what clients were told to be committed is there, unless somebody wanted it forgotten."""
        visible = self.visible
        for made in self._oracle.acknowledged:
            if made not in visible and made not in self._oracle.forgetting:
                self.violate(4, f"{made} was acknowledged and is gone")

    def check_log(self) -> None:
        """Check that the audit log is one unbroken tree, and has each acknowledged commit as done once."""
        frontier = Frontier()
        made: dict[str, int] = {}
        for item in self._tables.now(keyspace.AUDIT_BATCHES_PREFIX):
            batch = parse(item, AuditBatch).message
            frontier = frontier.extended(map(leaf_hash, batch.lines))
            if (batch.head.size, batch.head.root) != (frontier.size, frontier.root):
                self.violate(7, f"the log's batch {batch.first} does not follow from those before it")
            for record in map(AuditRecord.from_line, batch.lines):
                if record.outcome == OK and record.details.get("step") == "commit":
                    name = record.details.get("point") or record.details.get("object") or ""
                    made[name] = made.get(name, 0) + 1
        for name in self._oracle.acknowledged:
            if made.get(name, 0) != 1:
                self.violate(7, f"the log has {made.get(name, 0)} records of the commit of {name}")

    def check_tenants(self) -> None:
        """Check that no disk has a block under a tenant who never sealed it."""
        for name, host in self._nodes.items():
            for held in host.disk.copies.values():
                for ref in held:
                    if ref not in self._oracle.bodies and ref[0] != SYSTEM_TENANT:
                        self.violate(8, f"{name} holds {_name(ref)}, which that tenant never made")

    def _check_drop(self, node_id: str, ref: Ref) -> None:
        for epoch in self._grants:
            owners = self._layouts[epoch].owners_of_block(ref[1])
            if node_id not in owners and (not self.referenced(ref) or self._known_to(owners, ref)):
                return
        self.violate(9, f"{node_id} dropped {_name(ref)} under no grant, or its owners do not have it")

    def _known_to(self, owners: Iterable[str], ref: Ref) -> bool:
        """Whether all owners said a moment ago that they have a block.

        Rot that nobody has found yet is not theirs to know; what was garbage when they said so may have been collected
        since, and may be in use again since that; and one that said so may have lost its disk since.
        """
        spoilt = self.spoilt.get(ref, {})
        since_s = self._world.loop.time() - _CONFIRMED_S
        return all(
            self.intact(owner, ref)
            or (owner in spoilt and self._looks_whole(owner, ref))
            or self._collected.get((owner, ref), since_s) > since_s
            or self._lost.get((owner, ref), since_s) > since_s
            for owner in owners
        )

    def _looks_whole(self, node_id: str, ref: Ref) -> bool:
        copy = self._copy(node_id, ref)
        return copy is not None and not copy.aside

    # Events in the metadata store.

    def _changed(self, batch: WatchBatch) -> None:
        for key in batch.deletes:
            self._removed(key)
        for item in batch.puts:
            self._written(item)

    def _written(self, item: KeyValue) -> None:
        key = item.key
        if key.startswith(keyspace.LAYOUT_EPOCHS_PREFIX):
            layout = Layout.from_message(parse(item, common_pb2.Layout).message)
            self._layouts[layout.epoch] = layout
            self._living = tuple(sorted((*self._living, layout), key=lambda each: -each.epoch))
            self._world.note("layout", f"epoch {layout.epoch} over {[node.node_id for node in layout.nodes]}")
        elif key == keyspace.LAYOUT_GRANT:
            self._grants[parse(item, GrantRecord).message.epoch] = None
        elif key == keyspace.COLLECTION_EPOCH:
            self._world.note("collection", f"epoch {item.value.decode()}")
        else:
            self._written_by_tenant(item)

    def _written_by_tenant(self, item: KeyValue) -> None:
        for root, space in self._tenants.items():
            if not item.key.startswith(root):
                continue
            if item.key.startswith(space.points_prefix):
                point = parse(item, PointRecord).message
                roots = tuple(volume.root for volume in point.volumes)
                self._record(space.tenant, item.key, point.point_id, roots, forgotten=point.forgotten)
            elif item.key.startswith(space.objects_prefix):
                stored = parse(item, ObjectRecord).message
                self._record(space.tenant, item.key, stored.storage_id, (stored.root,), forgotten=False)
            elif item.key.startswith(space.sessions_prefix):
                session = parse(item, SessionRecord).message
                pinned: frozenset[Ref] = frozenset().union(
                    *(self.reach.below(space.tenant, pin) for pin in split_ids(session.pinned_roots))
                )
                self._sessions[session.session_id] = (space.tenant, pinned)

    def _removed(self, key: str) -> None:
        if key.startswith(keyspace.LAYOUT_EPOCHS_PREFIX):
            epoch = int(key.removeprefix(keyspace.LAYOUT_EPOCHS_PREFIX))
            self._living = tuple(layout for layout in self._living if layout.epoch != epoch)
            self._world.note("layout", f"epoch {epoch} ends")
            self.check_all()
            return
        for space in self._tenants.values():
            if key.startswith(space.sessions_prefix):
                self._sessions.pop(key.removeprefix(space.sessions_prefix), None)
            elif key.startswith((space.points_prefix, space.objects_prefix)):
                self._forget(space.tenant, key)

    def _record(self, tenant: int, key: str, made: str, roots: tuple[bytes, ...], *, forgotten: bool) -> None:
        place = f"{key}#{made}"
        before = self._records.get(place)
        if forgotten:
            if before is not None:
                self._drop(tenant, place)
            if made not in self._oracle.forgetting:
                self.violate(2, f"{made} was forgotten and nobody had asked for it")
            return
        if before is not None:
            if before != roots:
                self.violate(2, f"{made} has other roots than before")
            return
        self._records[place] = roots
        for root in roots:
            for ref in sorted(self.reach.below(tenant, root)):
                self._held_by[ref] = self._held_by.get(ref, 0) + 1
                if not self.durable(ref):
                    self.violate(1, f"{made} became visible and {_name(ref)} is not durable")

    def _forget(self, tenant: int, key: str) -> None:
        for place in [place for place in self._records if place.startswith(f"{key}#")]:
            made = place.rpartition("#")[2]
            if made not in self._oracle.forgetting:
                self.violate(2, f"{made} is gone and nobody had asked for it")
            self._drop(tenant, place)

    def _drop(self, tenant: int, place: str) -> None:
        for root in self._records.pop(place):
            for ref in self.reach.below(tenant, root):
                self._held_by[ref] -= 1
                if not self._held_by[ref]:
                    del self._held_by[ref]


def _name(ref: Ref) -> str:
    return f"block {ref[1].hex()[:12]} of tenant {ref[0]}"
