"""The parts of collection alone: spools, marks, plans, samples and explanations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from holdfast_coordinator.collection.explaining import AS_INDEX, hits_of, holders
from holdfast_coordinator.collection.graph import Graph, read_graph
from holdfast_coordinator.collection.held import HeldTree
from holdfast_coordinator.collection.marking import KnownNodes, Marker
from holdfast_coordinator.collection.planning import ListedPage, plan_copies, plan_page, plan_ranges
from holdfast_coordinator.collection.reclaimable import LeafSample, exclusive_to
from holdfast_coordinator.collection.roots import Source
from holdfast_coordinator.collection.spool import MarkSpool, RecordSpool
from holdfast_coordinator.commit_rules import positions
from holdfast_core.model.block import SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, generate_secrets
from holdfast_core.model.layout import Layout, LayoutNode
from holdfast_core.model.tree import DiffWalk, RootScan
from holdfast_proto.v1.records_pb2 import VolumeRecord
from tests.coordinator.content import Sealed, random_blocks, seal_volume

TOTAL = 128 * 128 + 300


def ids(count: int, *, seed: int = 1) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(32) for _ in range(count)]


@pytest.fixture(scope="module")
def ring() -> KeyRing:
    return KeyRing(generate_secrets(1, random.Random(1).randbytes))


class TestSpool:
    @pytest.mark.parametrize("in_memory", [10, 100, 10_000])
    def test_what_goes_in_comes_out_by_partition_however_often_it_spills(self, tmp_path: Path, in_memory: int) -> None:
        spool = MarkSpool(lambda block_id: block_id[0] % 8, 8, scratch=tmp_path, in_memory=in_memory)
        marked = ids(500)
        for at in range(0, 500, 25):
            spool.add(marked[at : at + 25])
            spool.add(marked[:7])
        found = spool.marks(0, 8)
        assert {block_id for part in found.values() for block_id in part} == set(marked)
        assert all(block_id[0] % 8 == partition for partition, part in found.items() for block_id in part)
        assert spool.marks(2, 4) == {partition: found[partition] for partition in (2, 3)}
        assert all(spool.count(partition) >= len(found[partition]) for partition in range(8))
        spool.close()

    def test_nothing_is_left_in_the_scratch_directory_even_while_it_runs(self, tmp_path: Path) -> None:
        spool = MarkSpool(lambda _: 0, 1, scratch=tmp_path, in_memory=4)
        spool.add(ids(100))
        assert list(tmp_path.iterdir()) == []
        spool.close()

    def test_a_scratch_directory_that_is_gone_is_told(self, tmp_path: Path) -> None:
        spool = MarkSpool(lambda _: 0, 1, scratch=tmp_path / "gone", in_memory=4)
        with pytest.raises(HoldfastError) as caught:
            spool.add(ids(100))
        assert caught.value.code is ErrorCode.DISK_FULL

    def test_records_come_back_in_order(self, tmp_path: Path) -> None:
        spool = RecordSpool(scratch=tmp_path)
        records = [(number % 3, bytes([number]) * number) for number in range(50)]
        spool.add(records[:20])
        spool.add(records[20:])
        assert list(spool.read()) == records
        spool.close()


class TestPlans:
    def test_a_page_is_divided_by_marks_and_stamps(self) -> None:
        marked, garbage, young = ids(3), ids(3, seed=2), ids(2, seed=3)
        listed = [marked[0], garbage[0], young[0], marked[1], garbage[1], young[1]]
        page = ListedPage(listed, [1, 2, 4, 8, 16, 32], [0, 4, 5, 9, 0, 6])
        plan = plan_page(page, frozenset(marked), cutoff=5)
        assert plan.garbage == (garbage[0], garbage[1])
        assert plan.garbage_lengths == (2, 16)
        assert (plan.young_copies, plan.young_bytes) == (2, 36)
        assert plan.held == {marked[0], marked[1]}

    def test_corrupt_copies_are_garbage_like_others_and_stand_for_nothing(self) -> None:
        marked, garbage, young = ids(2), ids(2, seed=2), ids(2, seed=3)
        page = ListedPage(
            [*marked, *garbage, *young],
            [1, 2, 4, 8, 16, 32],
            [0, 0, 4, 4, 5, 5],
            frozenset({marked[1], garbage[1], young[1]}),
        )
        plan = plan_page(page, frozenset(marked), cutoff=5)
        assert (plan.garbage, plan.garbage_lengths) == (tuple(garbage), (4, 8))
        assert (plan.young_copies, plan.young_bytes) == (2, 48)
        assert plan.held == {marked[0]}
        page = ListedPage(marked, [1, 2], [0, 0], frozenset(marked))
        plan = plan_page(page, frozenset(marked), cutoff=5)
        assert (plan.garbage, plan.young_copies, plan.held) == ((), 0, frozenset())

    def test_a_cutoff_of_nothing_makes_no_garbage(self) -> None:
        page = ListedPage(ids(2), [1, 1], [0, 3])
        assert plan_page(page, frozenset(), cutoff=0).garbage == ()

    def test_thin_and_lost_are_told_apart(self) -> None:
        everywhere, thin, foreign, nowhere = ids(4)
        layout = _layout("abc", owners=[[0, 1], [1, 2]])
        held = {"a": {everywhere, thin}, "b": {everywhere}, "c": {foreign}}
        plan = plan_copies({0: {everywhere, thin, nowhere}, 1: {foreign}}, held, layout)
        assert plan.thin == 3
        assert plan.nowhere == (nowhere,)

    def test_partitions_with_an_owner_that_did_not_answer_are_not_thin(self) -> None:
        (block_id,) = ids(1)
        layout = _layout("abc", owners=[[0, 1], [1, 2]])
        plan = plan_copies({0: {block_id}}, {"a": {block_id}, "c": set()}, layout)
        assert (plan.thin, plan.nowhere) == (0, ())

    def test_ranges_cover_everything_once_within_the_bound(self) -> None:
        counts = [3, 0, 9, 1, 1, 20, 0, 0, 2]
        ranges = plan_ranges(counts, marks_max=10)
        assert [partition for first, end in ranges for partition in range(first, end)] == list(range(9))
        assert all(sum(counts[first:end]) <= 10 or end - first == 1 for first, end in ranges)
        assert len(ranges) == 5

    def test_without_marks_there_is_one_range(self) -> None:
        assert plan_ranges([0] * 16, marks_max=10) == [(0, 16)]


class Nodes:
    """Index nodes that can be read, and how often they were."""

    def __init__(self, *sealed: Sealed) -> None:
        self.blocks = {block.id: block for each in sealed for block in each.index}
        self.reads: list[bytes] = []

    async def fetch(self, wanted: Sequence[bytes]) -> Mapping[bytes, SealedBlock]:
        self.reads += wanted
        missing = [node_id for node_id in wanted if node_id not in self.blocks]
        if missing:
            raise HoldfastError(ErrorCode.MISSING, "a node is on none of its owners", block_ids=missing)
        return {node_id: self.blocks[node_id] for node_id in wanted}


def _volume(ring: KeyRing, slots: Mapping[int, bytes]) -> tuple[VolumeRecord, Sealed]:
    return seal_volume(ring, slots, total=TOTAL)


class TestMarking:
    async def _marked(self, nodes: Nodes, ring: KeyRing, sources: list[Source], known: KnownNodes) -> set[bytes]:
        spool = MarkSpool(lambda _: 0, 1, scratch=None)
        await Marker(nodes.fetch, ring.opener(), spool, known).mark(iter(sources))
        return spool.marks(0, 1).get(0, set())

    @pytest.mark.parametrize("known_most", [2, 1_000_000])
    async def test_neighbours_share_their_reads_and_all_is_marked(self, ring: KeyRing, known_most: int) -> None:
        slots = random_blocks(1, range(0, TOTAL, 7))
        first, first_sealed = _volume(ring, slots)
        second, second_sealed = _volume(ring, slots | random_blocks(2, [7, 9000]))
        nodes, known = Nodes(first_sealed, second_sealed), KnownNodes(known_most)
        walks = [
            DiffWalk(first.root, positions(first), b"", 0, known=known),
            DiffWalk(second.root, positions(second), first.root, positions(first), known=known),
        ]
        marked = await self._marked(nodes, ring, [Source(str(at), walk) for at, walk in enumerate(walks)], known)
        assert marked == {block.id for each in (first_sealed, second_sealed) for block in each.everything}
        distinct = {block.id for each in (first_sealed, second_sealed) for block in each.index}
        assert len(nodes.reads) == len(distinct)

    async def test_pinned_roots_are_walked_without_knowing_their_shape(self, ring: KeyRing) -> None:
        volume, sealed = _volume(ring, random_blocks(1, range(0, TOTAL, 100)))
        source = Source("a session", RootScan([volume.root]))
        marked = await self._marked(Nodes(sealed), ring, [source], KnownNodes())
        assert marked == {block.id for block in sealed.everything}

    async def test_a_node_that_cannot_be_read_names_its_source(self, ring: KeyRing) -> None:
        good, good_sealed = _volume(ring, random_blocks(1, [1]))
        bad, bad_sealed = _volume(ring, random_blocks(2, [9000]))
        nodes = Nodes(good_sealed, bad_sealed)
        del nodes.blocks[bad_sealed.index[0].id]
        known = KnownNodes()
        sources = [
            Source("the good one", DiffWalk(good.root, positions(good), b"", 0, known=known)),
            Source("the bad one", DiffWalk(bad.root, positions(bad), b"", 0, known=known)),
        ]
        with pytest.raises(HoldfastError, match="the bad one cannot be read") as caught:
            await self._marked(nodes, ring, sources, known)
        assert caught.value.code is ErrorCode.MISSING


class TestExplaining:
    async def test_a_shared_block_is_found_at_every_place_of_every_tree(self, ring: KeyRing) -> None:
        shared = b"shared" * 10
        slots = random_blocks(1, range(0, TOTAL, 50))
        first, first_sealed = _volume(ring, slots | {3: shared, 9001: shared})
        second, second_sealed = _volume(ring, slots | {130: shared})
        other, other_sealed = _volume(ring, random_blocks(5, [1]))
        block_id = ring_block(ring, shared)
        nodes = Nodes(first_sealed, second_sealed, other_sealed)
        trees = [
            HeldTree(name, "vm-1", "", "root", volume.root, volume.block_bytes)
            for name, volume in (("p1", first), ("p2", second), ("p3", other))
        ]
        graph = await read_graph(
            [tree.root for tree in trees],
            nodes.fetch,
            ring.opener(),
            lambda leaf: hits_of(leaf, block_id),
            given={block_id: AS_INDEX},
        )
        found, more = holders(trees, graph)
        assert not more
        assert [(holder.resource_id, holder.offset_bytes, holder.role) for holder in found] == [
            ("p1", 3 * first.block_bytes, "data"),
            ("p1", 9001 * first.block_bytes, "data"),
            ("p2", 130 * first.block_bytes, "data"),
        ]
        assert len(nodes.reads) == len(set(nodes.reads))

    async def test_an_index_node_and_a_base_have_their_roles(self, ring: KeyRing) -> None:
        base = ids(1)[0]
        volume, sealed = seal_volume(ring, random_blocks(1, [5, 9000]), total=TOTAL, bases={9000: base})
        tree = HeldTree("p1", "vm-1", "", "root", volume.root, volume.block_bytes)
        leaf = sealed.index[0].id
        for asked, expected in ((leaf, ("index", False)), (base, ("base", True))):
            nodes = Nodes(sealed)
            if asked == leaf:
                del nodes.blocks[leaf]  # what is asked about need not be readable itself
            graph = await read_graph(
                [tree.root], nodes.fetch, ring.opener(), partial(hits_of, block_id=asked), given={asked: AS_INDEX}
            )
            (holder,), _ = holders([tree], graph)
            assert (holder.role, holder.HasField("offset_bytes")) == expected

    async def test_too_many_nodes_are_refused(self, ring: KeyRing) -> None:
        volume, sealed = _volume(ring, random_blocks(1, range(0, TOTAL, 100)))
        with pytest.raises(HoldfastError) as caught:
            await read_graph([volume.root], Nodes(sealed).fetch, ring.opener(), lambda _: None, nodes_max=10)
        assert caught.value.code is ErrorCode.LIMIT_EXCEEDED


class TestReclaimable:
    async def _graph(self, ring: KeyRing, sample: LeafSample, *made: tuple[VolumeRecord, Sealed]) -> Graph[list[bytes]]:
        nodes = Nodes(*(sealed for _, sealed in made))
        return await read_graph([volume.root for volume, _ in made], nodes.fetch, ring.opener(), sample.keep)

    async def test_it_is_what_the_sets_say(self, ring: KeyRing) -> None:
        base = random_blocks(1, range(0, TOTAL, 40))
        made = [
            _volume(ring, base | random_blocks(seed, slots))
            for seed, slots in ((2, range(0, 200)), (3, range(150, 300)), (4, range(9000, 9100)), (5, [0]))
        ]
        sample = LeafSample()
        graph = await self._graph(ring, sample, *made)
        reach = [{block.id for block in sealed.everything} for _, sealed in made]
        points, others = [0, 1, 2], [3]
        found = exclusive_to(
            [[made[at][0].root] for at in points], [made[at][0].root for at in others], graph, sample.bits
        )
        assert found.together == set().union(*(reach[at] for at in points)) - reach[3]
        for at in points:
            rest = set().union(*(reach[other] for other in range(4) if other != at))
            assert found.alone[at] == reach[at] - rest

    async def test_a_sample_stands_for_the_whole(self, ring: KeyRing) -> None:
        made = _volume(ring, random_blocks(1, range(4000)))
        sample = LeafSample(most=500)
        graph = await self._graph(ring, sample, made)
        found = exclusive_to([[made[0].root]], [], graph, sample.bits)
        assert sample.bits >= 3
        assert len(found.together) <= 600
        assert 0.7 < len(found.together) * 2**sample.bits / 4000 < 1.3


def ring_block(ring: KeyRing, plain: bytes) -> bytes:
    """Return the id that a plaintext's block gets."""
    return seal_volume(ring, {0: plain}, total=1)[1].blocks[0].id


def _layout(names: str, *, owners: Sequence[Sequence[int]]) -> Layout:
    table = b"".join(position.to_bytes(2, "little") for row in owners for position in row)
    nodes = tuple(LayoutNode(node_id=name, zone=name, capacity_bytes=1) for name in names)
    return Layout(epoch=1, seed=0, partitions=len(owners), replicas=len(owners[0]), nodes=nodes, owners=table)
