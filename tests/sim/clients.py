"""Clients of the simulated world: what a host does for one VM, call by call and block by block."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from holdfast_core.model.block import Kind, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.records import object_mac, point_mac
from holdfast_core.model.tree import (
    ObjectTreeBuilder,
    ObjectWalk,
    VolumeWalk,
    decode_object_leaf,
    decode_volume_leaf,
)
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_proto.v1 import state_pb2 as pb
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.records_pb2 import CONSISTENCY_OFFLINE, PointRecord, VmRecord, VolumeRecord, VolumeSpec
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub
from holdfast_storagenode.store import kind_of
from tests.sim.coordinators import SimEndpoints
from tests.sim.network import Network
from tests.sim.oracle import Content, Oracle
from tests.sim.rpc import SimChannels, inject
from tests.sim.uploads import BLOCK_BYTES, POSITIONS, Index, Place, Sealing, Upload, build_index
from tests.sim.world import Expected, Process, World

T = TypeVar("T")

CALL_TIMEOUT_S: Final = 6.0
_TRIES: Final = 6
_COMMITS: Final = 12
_PASSING: Final = frozenset(
    {ErrorCode.UNREACHABLE, ErrorCode.CONFLICT, ErrorCode.NOT_READY, ErrorCode.NO_QUORUM, ErrorCode.DISK_FULL}
)
EMPTY: Final = Index({}, {}, b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """How a client goes about a session.

    Attributes:
        stall_s: how long it does nothing before its commit.
        keeps_alive: whether it keeps its session alive meanwhile.
        pause_s: how long it waits between its blocks and its index.
    """

    stall_s: float = 0.0
    keeps_alive: bool = True
    pause_s: float = 0.0


class GaveUp(Expected):
    """A client left something undone; nothing is wrong with that."""


class Client:
    """One process of a client, for one VM of one tenant."""

    def __init__(
        self,
        world: World,
        name: str,
        network: Network,
        coordinators: Sequence[str],
        oracle: Oracle,
        *,
        vm_id: str,
        tenant: str,
    ) -> None:
        """Start it; the VM's content is empty."""
        self.process = Process(world, name)
        self.vm_id = vm_id
        self.tenant = tenant
        self.content: Content = {}
        self._world = world
        self._network = network
        self._oracle = oracle
        self._endpoints = SimEndpoints(self.process, coordinators, network, tenant=tenant)
        self._pool = NodePool(clock=self.process.clock)
        inject(self._pool, "_channels", SimChannels(self.process, network))
        self._dice = world.random(f"{name}/{world.loop.time():.6f}")

    def note(self, what: str) -> None:
        """Write a line of the trace."""
        self._world.note(self.process.name, what)

    async def call(self, name: str, request: Any) -> Any:
        """Call a method of the state service; what may pass is tried again.

        Raises:
            HoldfastError: what a coordinator said, or what did not pass.
        """
        for attempt in range(_TRIES):
            try:
                return await self._endpoints.call(
                    lambda channel: getattr(StateServiceStub(channel), name), request, timeout_s=CALL_TIMEOUT_S
                )
            except HoldfastError as error:
                if error.code not in _PASSING or attempt == _TRIES - 1:
                    raise
                await self.process.sleep(self._dice.uniform(0.2, 1.5))
        raise AssertionError("the last try returns or raises")

    async def register(self) -> None:
        """Register the VM."""
        vm = VmRecord(vm_id=self.vm_id, volumes=[VolumeSpec(name="root", uri="/disks/root")])
        await self.call("RegisterVm", pb.RegisterVmRequest(vm=vm))

    async def points(self) -> list[PointRecord]:
        """Return the VM's living points, oldest first."""
        answer = await self.call("ListPoints", pb.ListPointsRequest(vm_id=self.vm_id))
        return list(answer.points)

    # Writing points.

    async def snapshot(self, manners: Manners = Manners(), *, base_id: str = "") -> str:
        """Take a snapshot, perhaps on a base; return its id. Raises as `save`."""
        return await self.save(pb.BeginPointRequest(base_id=base_id), manners)

    async def backup(self, snapshot_id: str, manners: Manners = Manners(), *, parent_id: str = "") -> str:
        """Take a backup; return its id. Raises as `save`."""
        request = pb.BeginPointRequest(incremental=True, snapshot_id=snapshot_id, parent_id=parent_id)
        return await self.save(request, manners)

    async def begin(self, request: pb.BeginPointRequest) -> Session:
        """Begin a session for a point. Raises as `call`."""
        request.vm_id = self.vm_id
        request.nonce = self._dice.randbytes(16)
        request.takeover = True
        begun = await self.call("BeginPoint", request)
        self.note(f"begins {begun.session_id} on {begun.parent.point_id or begun.base.point_id or 'nothing'}")
        return Session(self, begun)

    async def save(self, request: pb.BeginPointRequest, manners: Manners) -> str:
        """Make a point of the VM's content; return its id.

        Raises:
            GaveUp: it could not, for a reason that is nobody's fault.
            HoldfastError: a coordinator refused it for good.
        """
        session = await self.begin(request)
        keeping = self.process.spawn(session.keep_alive()) if manners.keeps_alive else None
        try:
            await session.write_blocks()
            await self.process.sleep(manners.pause_s)
            await session.write_index()
            if manners.stall_s:
                self.note(f"stalls in {session.session_id} for {manners.stall_s:.1f} s")
                await self.process.sleep(manners.stall_s)
            return await session.commit()
        finally:
            if keeping is not None:
                keeping.cancel()

    async def forget(self, point_id: str) -> None:
        """Forget a point. Raises as `call`."""
        self._oracle.forgetting[point_id] = None
        self.note(f"forgets {point_id}")
        await self.call("ForgetPoint", pb.ForgetPointRequest(point_id=point_id))

    # Reading.

    async def restore(self, snapshot_id: str, point_id: str) -> bool:
        """Restore a point and compare it; return whether that could be done, complain if the bytes are others."""
        try:
            answer = await self.call(
                "ResolvePoint",
                pb.ResolvePointRequest(snapshot_id=snapshot_id, backup_id="" if point_id == snapshot_id else point_id),
            )
        except HoldfastError as error:
            self._excuse(error, point_id)
            return False
        volume = answer.point.volumes[0]

        async def read(reader: BlockReader) -> Content:
            index = await self.read_index(reader, volume.root)
            wanted = {place.block_id for place in index.places.values()}
            bodies = await reader.fetch(sorted(wanted | {place.base_id for place in index.places.values()} - {b""}))
            opener = self._oracle.ring(answer.grant.keys).opener()
            return {slot: opener.open(bodies[place.block_id]) for slot, place in index.places.items()}

        content = await self._read(answer.grant, point_id, read)
        if content is None:
            return False
        if content != self._oracle.points[point_id]:
            self._oracle.complain(f"{point_id} restores to other bytes")
        return True

    async def read_index(self, reader: BlockReader, root: bytes) -> Index:
        """Read a volume's tree. Raises as `BlockReader.fetch`."""
        opener = self._oracle.rings[self._tenant_number].opener()
        walk = VolumeWalk(root, POSITIONS)
        leaves: list[tuple[int, bytes]] = []
        while not walk.done:
            nodes = await reader.fetch(walk.wanted())
            walk.feed({node_id: opener.open(block) for node_id, block in nodes.items()})
            leaves += walk.take_leaves()
        leaves += walk.take_leaves()
        nodes = await reader.fetch([leaf_id for _, leaf_id in leaves])
        places: dict[int, Place] = {}
        for number, leaf_id in leaves:
            leaf = decode_volume_leaf(
                leaf_id, opener.open(nodes[leaf_id]), leaf_index=number, block_count_total=POSITIONS
            )
            for slot, *names in zip(leaf.slots, leaf.fingerprints, leaf.block_ids, leaf.base_ids, strict=True):
                places[number * 128 + slot] = Place(*names)
        return Index(places, dict(leaves), root)

    async def _read(self, grant: Grant, resource_id: str, read: Callable[[BlockReader], Awaitable[T]]) -> T | None:
        """Read something with fresh grants as long as blocks are missed; None if it could not be read."""
        for attempt in range(_TRIES):
            reader = self.reader(grant)
            try:
                return await read(reader)
            except HoldfastError as error:
                if attempt == _TRIES - 1 or error.code not in (
                    ErrorCode.MISSING,
                    ErrorCode.CORRUPT,
                    ErrorCode.UNREACHABLE,
                ):
                    self._excuse(error, resource_id)
                    return None
            await self.process.sleep(self._dice.uniform(0.5, 2.0))
            try:
                request = pb.RefreshGrantRequest(resource_id=resource_id)
                grant = (await self.call("RefreshGrant", request)).grant
            except HoldfastError as error:
                self._excuse(error, resource_id)
                return None
        return None

    def reader(self, grant: Grant) -> BlockReader:
        """Return what reads under a grant."""
        self._pool.update(grant.nodes)
        layouts = tuple(map(Layout.from_message, grant.layouts))
        self._oracle.ring(grant.keys)
        self._tenant_number = int(grant.keys.tenant)
        return BlockReader(self._pool, lambda: layouts, lambda: grant.capability)

    def _excuse(self, error: HoldfastError, resource_id: str) -> None:
        """Complain of an error for which there is no excuse."""
        if error.code in _PASSING or resource_id in self._oracle.forgetting:
            return
        self._oracle.complain(f"{resource_id} cannot be read: {error.code.name}: {error.message}")

    # Objects.

    async def store_object(self, task_id: str, cuts: Sequence[bytes]) -> str:
        """Store an object; return its id. Raises as `save`."""
        request = pb.BeginObjectRequest(task_id=task_id, nonce=self._dice.randbytes(16))
        begun = await self.call("BeginObject", request)
        sealing = Sealing(self._oracle.ring(begun.grant.keys), self._oracle)
        upload = Upload(self.process, self._pool, self._oracle, begun.session_id, begun.grant, self._dice)
        builder = ObjectTreeBuilder(sealing.keep_node)
        for cut in cuts:
            builder.add(sealing.ring.fingerprint(cut), sealing.seal(Kind.APPLICATION, cut).id, len(cut))
        root = builder.finish()
        size = sum(map(len, cuts))
        mac = object_mac(
            sealing.ring,
            tenant=sealing.ring.tenant,
            storage_id=begun.session_id,
            task_id=task_id,
            size_bytes=size,
            root=root,
        )
        commit = pb.CommitObjectRequest(
            session_id=begun.session_id, size_bytes=size, root=root, block_count=len(cuts), mac=mac
        )
        await self.send(begun.session_id, upload, list(sealing.made.values()))
        self._oracle.objects[begun.session_id] = b"".join(cuts)
        self._oracle.tenants[begun.session_id] = self.tenant
        await self.commit("CommitObject", commit, upload)
        return str(begun.session_id)

    async def read_object(self, storage_id: str) -> bool:
        """Read an object and compare it; return whether that could be done."""
        try:
            answer = await self.call("ResolveObject", pb.ResolveObjectRequest(storage_id=storage_id))
        except HoldfastError as error:
            self._excuse(error, storage_id)
            return False
        record = answer.object

        async def read(reader: BlockReader) -> bytes:
            opener = self._oracle.ring(answer.grant.keys).opener()
            walk = ObjectWalk(record.root, block_count=record.block_count, size_bytes=record.size_bytes)
            data = b""
            while not walk.done or walk.leaves:
                for ref in walk.take_leaves():
                    node = await reader.fetch([ref.leaf_id])
                    leaf = decode_object_leaf(ref, opener.open(node[ref.leaf_id]))
                    bodies = await reader.fetch(leaf.block_ids)
                    data += b"".join(opener.open(bodies[block_id]) for block_id in leaf.block_ids)
                if not walk.done:
                    nodes = await reader.fetch(walk.wanted())
                    walk.feed({node_id: opener.open(block) for node_id, block in nodes.items()})
            return data

        data = await self._read(answer.grant, storage_id, read)
        if data is not None and data != self._oracle.objects[storage_id]:
            self._oracle.complain(f"{storage_id} has other bytes")
        return data is not None

    async def forget_object(self, storage_id: str) -> None:
        """Forget an object. Raises as `call`."""
        self._oracle.forgetting[storage_id] = None
        with suppress(HoldfastError):
            await self.call("ForgetObject", pb.ForgetObjectRequest(storage_id=storage_id))

    # What points and objects have in common.

    async def send(
        self, session_id: str, upload: Upload, blocks: Sequence[SealedBlock], *, again: bool = False
    ) -> None:
        """Make blocks durable, refreshing the grant where the layout has changed.

        Raises:
            GaveUp: too few nodes take them, or the session has ended.
        """
        for _ in range(_COMMITS):
            with suppress(HoldfastError):
                if await upload.send(blocks, again=again):
                    return
            await self.process.sleep(self._dice.uniform(0.1, 1.5))
            await self._refresh(session_id, upload)
        raise GaveUp(f"the blocks of {session_id} are taken by too few")

    async def _refresh(self, session_id: str, upload: Upload) -> None:
        try:
            upload.take((await self.call("RefreshGrant", pb.RefreshGrantRequest(session_id=session_id))).grant)
        except HoldfastError as error:
            if error.code is ErrorCode.SESSION_LAPSED:
                raise GaveUp(f"{session_id} has lapsed") from error
            if error.code not in _PASSING:
                raise

    async def commit(self, name: str, request: Any, upload: Upload) -> None:
        """Commit a session, sending again what is not durable.

        Raises:
            GaveUp: it lapsed, or nobody takes what is missing.
        """
        session_id = request.session_id
        for _ in range(_COMMITS):
            try:
                await self.call(name, request)
            except HoldfastError as error:
                if error.code is ErrorCode.SESSION_LAPSED:
                    raise GaveUp(f"{session_id} has lapsed") from error
                if error.code is ErrorCode.NOT_DURABLE:
                    self.note(f"sends {len(error.block_ids)} blocks of {session_id} again")
                    lacking = [self._oracle.bodies[(upload.tenant, block_id)] for block_id in error.block_ids]
                    await self._refresh(session_id, upload)
                    await self.send(session_id, upload, lacking, again=True)
                elif error.code not in _PASSING:
                    raise
                else:
                    await self.process.sleep(self._dice.uniform(0.2, 1.5))
            else:
                self._oracle.acknowledged[session_id] = None
                self.note(f"has {session_id} committed")
                return
        raise GaveUp(f"{session_id} cannot be committed")


class Session:
    """One point in the making."""

    def __init__(self, client: Client, begun: pb.BeginPointResponse) -> None:
        """Go on from what Begin answered."""
        self._client = client
        self._begun = begun
        self._oracle = client._oracle
        self.session_id = begun.session_id
        self.grant = begun.grant
        self.sealing = Sealing(self._oracle.ring(begun.grant.keys), self._oracle)
        self.upload = Upload(client.process, client._pool, self._oracle, begun.session_id, begun.grant, client._dice)
        self.content = dict(client.content)
        self.index = EMPTY

    async def write_blocks(self) -> None:
        """Compare with what the session builds on, and send what is new. Raises GaveUp as `Client.send`."""
        damaged = self._begun.damaged_ids
        shunned = frozenset(damaged[at : at + 32] for at in range(0, len(damaged), 32))
        old = await self._old_index()
        self.index = build_index(self.sealing, self.content, old, shunned=shunned, deltas=self._client._dice)
        blocks = [block for block in self.sealing.made.values() if kind_of(block.data) != Kind.INDEX]
        await self._client.send(self.session_id, self.upload, blocks)

    async def write_index(self) -> None:
        """Send the index. Raises GaveUp as `Client.send`."""
        await self._client.send(self.session_id, self.upload, list(self.sealing.made.values()))

    async def commit(self) -> str:
        """Make the point visible; return its id. Raises GaveUp as `Client.commit`."""
        volume = VolumeRecord(
            name="root",
            size_bytes=POSITIONS * BLOCK_BYTES,
            block_bytes=BLOCK_BYTES,
            root=self.index.root,
            consistency=CONSISTENCY_OFFLINE,
            block_count=len(self.content),
        )
        parent_id = self._begun.parent.point_id
        mac = point_mac(
            self.sealing.ring,
            tenant=self.sealing.ring.tenant,
            point_id=self.session_id,
            vm_id=self._begun.vm.vm_id,
            parent_id=parent_id,
            volumes=[volume],
        )
        request = pb.CommitPointRequest(session_id=self.session_id, volumes=[volume], mac=mac, parent_id=parent_id)
        self._oracle.points[self.session_id] = self.content
        self._oracle.tenants[self.session_id] = self._client.tenant
        await self._client.commit("CommitPoint", request, self.upload)
        return self.session_id

    async def keep_alive(self) -> None:
        """Keep the session until cancelled or until it has lapsed."""
        request = pb.KeepAliveRequest(session_id=self.session_id)
        while True:
            await self._client.process.sleep(self._begun.session_ttl_ms / 3000)
            try:
                answer = await self._client.call("KeepAlive", request)
            except HoldfastError as error:
                if error.code is ErrorCode.SESSION_LAPSED:
                    return
            else:
                self.upload.capability = answer.capability or self.upload.capability

    async def _old_index(self) -> Index:
        """Read the tree of the parent, or of the base; nothing is inherited where that cannot be read."""
        older = self._begun.parent if self._begun.HasField("parent") else self._begun.base
        if not older.volumes or not older.volumes[0].root:
            return EMPTY
        reader = self._client.reader(self.grant)
        try:
            return await self._client.read_index(reader, older.volumes[0].root)
        except HoldfastError as error:
            self._client.note(f"cannot read what {self.session_id} builds on: {error.code.name}")
            return EMPTY


def make_content(dice: random.Random, pool: Sequence[bytes], *, count: int) -> Content:
    """Return content for `count` positions, some of it from a pool that VMs share."""
    slots = sorted(dice.sample(range(POSITIONS), count))
    return {slot: dice.choice(pool) if dice.random() < 0.5 else dice.randbytes(48) for slot in slots}


def change_content(content: Content, dice: random.Random, pool: Sequence[bytes]) -> Content:
    """Return the content after a while of work: some of it written, some zeroed."""
    changed = dict(content)
    for slot in dice.sample(sorted(content), min(len(content), dice.randint(1, 4))):
        if dice.random() < 0.15:
            del changed[slot]
        else:
            changed[slot] = dice.choice(pool) if dice.random() < 0.5 else dice.randbytes(48)
    changed[dice.randrange(POSITIONS)] = dice.randbytes(48)
    return changed
