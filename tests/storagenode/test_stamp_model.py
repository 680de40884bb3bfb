"""The engine against a simple model of stamps, with crashes, restarts, checkpoints, compaction, rot and index loss."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.store import Holding, Verdict
from tests.storagenode.blocks import make_blocks, partition_of
from tests.storagenode.engines import open_engine

BLOCKS = make_blocks(16, size=200)
OPTIONS = EngineOptions(capacity_bytes=1 << 30, reserve_bytes=0, segment_bytes=1500, checkpoint_entries=6)

Some = st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=6)
# How far behind the newest epoch a session or a cut-off is.
Behind = st.integers(0, 3)


class StampModel(RuleBasedStateMachine):
    """Numbers of blocks with their own stamps; floors of partitions and of everything; what was learnt and seen."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="stamp-model-"))
        self.lives = 0
        self.directory = self.root / "0"
        self.directory.mkdir()
        self.store = open_engine(self.directory, options=OPTIONS)
        self.clock = 1
        self.known = False
        self.own: dict[int, int] = {}
        self.floor = 0
        self.floors: dict[int, int] = {}
        self.cutoff = 0
        self.learnt = 0

    @initialize()
    def begin(self) -> None:
        """Most runs know their stamps from the start; losing the index takes that away."""
        self.learn()

    @rule()
    def raise_epoch(self) -> None:
        """A collection begins somewhere; nobody has told the node yet."""
        self.clock += 1

    @rule()
    def learn(self) -> None:
        self.store.learn_epoch(self.clock)
        self.learnt = max(self.learnt, self.clock)
        if not self.known:
            self.known, self.floor = True, max(self.floor, self.learnt)

    @rule(numbers=Some, behind=Behind)
    def put(self, numbers: list[int], behind: int) -> None:
        stamp = max(0, self.clock - behind)
        verdicts = self.store.put(1, [BLOCKS[number] for number in numbers], stamp=stamp)
        for number, verdict in zip(numbers, verdicts, strict=True):
            assert verdict is (Verdict.PRESENT if number in self.own else Verdict.OK)
            self.own[number] = max(stamp, self.own.get(number, 0))

    @rule(numbers=Some, behind=Behind, verify=st.booleans())
    def find(self, numbers: list[int], behind: int, verify: bool) -> None:
        stamp = max(0, self.clock - behind)
        verdicts = self.store.has(1, [BLOCKS[number].id for number in numbers], verify=verify, stamp=stamp)
        for number, verdict in zip(numbers, verdicts, strict=True):
            assert verdict is (Verdict.OK if number in self.own else Verdict.MISSING)
            if number in self.own:
                self.own[number] = max(stamp, self.own[number])

    @rule(numbers=Some, behind=Behind)
    def delete(self, numbers: list[int], behind: int) -> None:
        cutoff = max(1, self.clock - behind)
        ids = [BLOCKS[number].id for number in numbers]
        if not self.known or cutoff < self.cutoff:
            with pytest.raises(HoldfastError) as refused:
                self.store.delete(1, ids, cutoff=cutoff)
            assert refused.value.code is (ErrorCode.CONFLICT if self.known else ErrorCode.NOT_READY)
            return
        verdicts = self.store.delete(1, ids, cutoff=cutoff)
        self.cutoff = cutoff
        for number, verdict in zip(numbers, verdicts, strict=True):
            if number not in self.own:
                assert verdict is Verdict.MISSING
            elif self.counted(number) >= cutoff:
                assert verdict is Verdict.KEPT
            else:
                assert verdict is Verdict.OK
                del self.own[number]

    @rule(numbers=Some)
    def delete_outright(self, numbers: list[int]) -> None:
        verdicts = self.store.delete(1, [BLOCKS[number].id for number in numbers])
        for number, verdict in zip(numbers, verdicts, strict=True):
            assert verdict is (Verdict.OK if number in self.own else Verdict.MISSING)
            self.own.pop(number, None)

    @rule(partitions=st.lists(st.integers(0, 15), max_size=3), behind=Behind)
    def raise_floor(self, partitions: list[int], behind: int) -> None:
        epoch = max(0, self.clock - behind)
        self.store.raise_floor(partitions, epoch)
        for partition in partitions:
            self.floors[partition] = max(epoch, self.floors.get(partition, 0))

    @rule()
    def checkpoint(self) -> None:
        assert self.store.checkpoint()

    @rule()
    def compact(self) -> None:
        self.store.compact(dead_fraction_min=0.01)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = open_engine(self.directory, options=OPTIONS)

    @rule(lose_index=st.booleans())
    def crash(self, lose_index: bool) -> None:
        """Go on from what is on the disk now, perhaps without the index."""
        self.lives += 1
        crashed = self.root / str(self.lives)
        # A copy that is made while the index is written is nothing that a crash could leave.
        with self.store._checkpointer._writing:
            shutil.copytree(self.directory, crashed)
        self.store.close()
        shutil.rmtree(self.directory)
        self.directory = crashed
        if lose_index:
            shutil.rmtree(crashed / "index")
            self.known = False
        self.store = open_engine(crashed, options=OPTIONS)

    def counted(self, number: int) -> int:
        return max(self.own[number], self.floor, self.floors.get(partition_of(BLOCKS[number].id), 0))

    @invariant()
    def every_block_is_there_and_no_other(self) -> None:
        listed = {entry.block_id for entry in self.store.scan(1, partition=None, after=b"", limit=99)}
        assert listed == {BLOCKS[number].id for number in self.own}

    @precondition(lambda self: self.known)
    @invariant()
    def stamps_are_those_of_the_model(self) -> None:
        listed = {entry.block_id: entry.stamp for entry in self.store.scan(1, partition=None, after=b"", limit=99)}
        assert listed == {BLOCKS[number].id: self.counted(number) for number in self.own}
        assert self.store.epoch == self.learnt

    @invariant()
    def holdings_are_those_of_the_model(self) -> None:
        for partition in range(16):
            ids = [BLOCKS[number].id for number in self.own if partition_of(BLOCKS[number].id) == partition]
            total = sum(int.from_bytes(block_id, "big") for block_id in ids) % 2**256
            expected = [Holding(1, len(ids), total.to_bytes(32, "big"))] if ids else []
            assert self.store.holdings(partition) == expected
        assert self.store.tenants() == ([1] if self.own else [])

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)


TestStamps = StampModel.TestCase
TestStamps.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
