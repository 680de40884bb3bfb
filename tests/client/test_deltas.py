"""Coding waiting blocks: against the right bases, or plain; never against what must not be a base."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.bases import FETCHES_MAX, BaseFetcher
from holdfast.deltas import PROBE_EVERY, SPANS_IN_VAIN_MAX, TRIES_FIRST, DeltaCoder, Trials
from holdfast.spans import UNSEALED, FingerprintCache, SealedSpan, SpanContext, Waiting, seal_volume_span
from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, TenantSecrets, generate_secrets
from holdfast_core.model.limits import VOLUME_BLOCK_BYTES_MIN
from holdfast_core.runtime.blocks.reader import Consumer, Unreadable
from tests.client.rig import MemorySource, noise

_FIRST = generate_secrets(1, lambda size: noise(size, 1))
SECRETS = TenantSecrets(
    1, _FIRST.data_root, {**_FIRST.data_epochs, 2: noise(32, 5)}, _FIRST.structure_root, _FIRST.structure_epochs
)
RING = KeyRing(SECRETS)
SMALL = VOLUME_BLOCK_BYTES_MIN
EPOCH = 2


def sealed(plain: bytes, *, epoch: int = EPOCH, base: SealedBlock | None = None) -> SealedBlock:
    """A volume block; against `base`, whose plaintext it is close to, if that is given."""
    sealer = RING.sealer(Kind.VOLUME, epoch)
    if base is None:
        return sealer.seal(plain, codec=Codec.ZSTD)
    block = sealer.seal(plain, codec=Codec.ZSTD_DELTA, base=(base.id, RING.opener().open(base)))
    assert block.codec is Codec.ZSTD_DELTA
    return block


class Shelf:
    """Blocks to fetch. Counts how; some ids may be gone, or not be reached, or be denied."""

    def __init__(self, *blocks: SealedBlock) -> None:
        self.blocks = {block.id: block for block in blocks}
        self.asked: list[list[bytes]] = []
        self.unreachable: set[bytes] = set()
        self.denied = False
        self.gate: asyncio.Event | None = None
        self.all_busy = asyncio.Event()

    async def fetch_into(self, block_ids: Iterable[bytes], consumer: Consumer, *, block_bytes: int) -> Unreadable:
        ids = list(block_ids)
        self.asked.append(ids)
        if len(self.asked) == FETCHES_MAX:
            self.all_busy.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.denied:
            raise HoldfastError(ErrorCode.DENIED, "not for you")
        here = [each for each in ids if each in self.blocks and each not in self.unreachable]
        bodies = [memoryview(self.blocks[each].data) for each in here]
        refused = await asyncio.to_thread(consumer, here, bodies)
        missing = tuple(each for each in ids if each not in self.blocks)
        return Unreadable(missing, tuple(refused), tuple(each for each in ids if each in self.unreachable))


class Rig:
    """A coder over a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.damaged: list[bytes] = []
        self.fetcher = BaseFetcher(shelf, RING.opener(), key_epoch=EPOCH, damaged=self.damaged.extend)
        self.cache = FingerprintCache()
        self.executor = ThreadPoolExecutor(2)
        self.coder = DeltaCoder(self.fetcher, RING.sealer(Kind.VOLUME, EPOCH), self.executor, self.cache)

    async def complete(self, *spans: SealedSpan, every: int = 1) -> list[SealedSpan]:
        """Complete spans, all at once."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[SealedSpan]] = [loop.create_future() for _ in spans]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.coder.complete(each, block_bytes=SMALL, every=every)) for each in futures]
            for future, span in zip(futures, spans, strict=True):
                future.set_result(span)
        return [task.result() for task in tasks]

    def run(self, *spans: SealedSpan) -> list[SealedSpan]:
        """Complete spans, all at once, in a loop of their own."""
        try:
            return asyncio.run(self.complete(*spans))
        finally:
            self.executor.shutdown()


def span_of(*blocks: tuple[bytes, bytes]) -> SealedSpan:
    """A span in which every block waits: its plaintext and the id of its base."""
    waiting = [Waiting(at, plain, base_id) for at, (plain, base_id) in enumerate(blocks)]
    return SealedSpan(
        slots=list(range(len(blocks))),
        fingerprints=[RING.fingerprint(plain) for plain, _ in blocks],
        references=[UNSEALED] * len(blocks),
        waiting=waiting,
        changed_blocks=len(blocks),
        changed_bytes=sum(len(plain) for plain, _ in blocks),
    )


def check(spans: Sequence[SealedSpan], plains: Sequence[Sequence[bytes]], shelf: Shelf) -> None:
    """Every reference opens to its plaintext, and no base is a delta or of another key epoch."""
    blocks = {**shelf.blocks, **{block.id: block for span in spans for block, _ in span.new}}
    deltas = 0
    for span, expected in zip(spans, plains, strict=True):
        assert span.waiting == []
        for (block_id, base_id), plain in zip(span.references, expected, strict=True):
            block = blocks[block_id]
            assert (block.codec is Codec.ZSTD_DELTA) == (base_id != b"")
            base = RING.opener().open(blocks[base_id]) if base_id else None
            assert RING.opener().open(block, base_plain=base, base_id=base_id) == plain
            if base_id:
                assert blocks[base_id].codec is not Codec.ZSTD_DELTA
        for block, size in span.new:
            assert size == len(RING.opener().open(block)) if block.codec is not Codec.ZSTD_DELTA else size
        deltas += span.delta_blocks
        assert span.delta_bytes <= span.delta_plain_bytes
    assert deltas == sum(block.codec is Codec.ZSTD_DELTA for span in spans for block, _ in span.new)


def edited(plain: bytes, at: int, patch: bytes) -> bytes:
    return plain[:at] + patch + plain[at + len(patch) :]


def test_a_block_that_changed_a_little_is_a_small_delta() -> None:
    before = sealed(noise(SMALL))
    after = edited(noise(SMALL), 100, b"changed")
    rig = Rig(Shelf(before))
    (span,) = rig.run(span_of((after, before.id)))
    assert span.references == [(span.new[0][0].id, before.id)]
    assert (span.delta_blocks, span.delta_plain_bytes) == (1, SMALL)
    assert span.delta_bytes == len(span.new[0][0].data) < 200
    check([span], [[after]], rig.shelf)
    assert rig.cache.get(span.fingerprints[0]) == span.references[0]


base_kinds = st.sampled_from(["plain", "old epoch", "a delta", "missing", "corrupt"])


@pytest.mark.slow
@given(
    st.lists(
        st.lists(st.tuples(base_kinds, st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=6), max_size=4
    )
)
def test_whatever_the_bases_are_every_block_comes_out(spans: list[list[tuple[str, int, int, bool]]]) -> None:
    shelf = Shelf()
    old = {number: noise(SMALL, number) for number in range(6)}
    anchor = sealed(noise(SMALL, 77))
    bases: dict[tuple[str, int], bytes] = {}
    for number, plain in old.items():
        made = {
            "plain": sealed(plain),
            "old epoch": sealed(plain, epoch=1),
            "a delta": sealed(edited(noise(SMALL, 77), number, b"x"), base=anchor),
            "missing": sealed(plain + b"m"),
            "corrupt": sealed(plain + b"c"),
        }
        for kind, block in made.items():
            bases[kind, number] = block.id
            if kind != "missing":
                shelf.blocks[block.id] = block
    for number in old:
        wrong = sealed(noise(100, number))
        shelf.blocks[bases["corrupt", number]] = wrong
    wanted = [
        [
            (noise(SMALL, 50 + edit) if new else edited(old[number], 9, bytes([edit])), bases[kind, number])
            for kind, number, edit, new in span
        ]
        for span in spans
    ]
    rig = Rig(shelf)
    done = rig.run(*[span_of(*blocks) for blocks in wanted])
    for number in old:
        shelf.blocks.pop(bases["corrupt", number])
    check(done, [[plain for plain, _ in blocks] for blocks in wanted], shelf)
    usable = {bases["plain", number] for number in old}
    assert {base for span in done for _, base in span.references if base} <= usable
    new_ids = [block.id for span in done for block, _ in span.new]
    assert len(new_ids) == len(set(new_ids)), "a content is sealed once a session"
    assert set(rig.damaged) <= {bases[kind, number] for kind in ("missing", "corrupt") for number in old}


def test_content_that_is_met_again_is_not_sealed_again() -> None:
    before = [sealed(noise(SMALL, number)) for number in range(3)]
    plain = edited(noise(SMALL, 0), 5, b"!")
    rig = Rig(Shelf(*before))
    spans = rig.run(span_of((plain, before[0].id), (plain, before[1].id)), span_of((plain, before[2].id)), span_of())
    assert sum(len(span.new) for span in spans) == 1
    assert len({reference for span in spans for reference in span.references}) == 1
    assert sum(span.reused_bytes for span in spans) == 2 * SMALL


def test_what_was_met_by_a_sealer_is_not_fetched_for() -> None:
    before = sealed(noise(SMALL))
    rig = Rig(Shelf(before))
    plain = noise(SMALL, 2)
    rig.cache.put(RING.fingerprint(plain), (b"i" * 32, b""))
    (span,) = rig.run(span_of((plain, before.id)))
    assert (span.references, span.new, span.reused_bytes) == ([(b"i" * 32, b"")], [], SMALL)
    assert rig.shelf.asked == []


def test_what_several_spans_want_meanwhile_is_fetched_as_one() -> None:
    before = [sealed(noise(SMALL, number)) for number in range(40)]
    shelf = Shelf(*before)
    rig = Rig(shelf)

    async def run() -> None:
        shelf.gate = asyncio.Event()
        spans = [span_of((edited(noise(SMALL, at), 3, b"?"), block.id)) for at, block in enumerate(before)]
        everything = asyncio.ensure_future(rig.complete(*spans))
        await shelf.all_busy.wait()
        shelf.gate.set()
        assert all(span.delta_blocks == 1 for span in await everything)

    asyncio.run(run())
    rig.executor.shutdown()
    assert sorted(map(len, shelf.asked)) == [1, 1, 38]
    assert len({each for asked in shelf.asked for each in asked}) == 40


@pytest.mark.parametrize("how", ["denied", "unreachable"])
def test_once_bases_cannot_be_had_nobody_waits_for_them_again(how: str) -> None:
    before = [sealed(noise(SMALL, number)) for number in range(3)]
    shelf = Shelf(*before)
    shelf.denied = how == "denied"
    shelf.unreachable = {block.id for block in before} if how == "unreachable" else set()
    rig = Rig(shelf)

    async def run() -> None:
        for at, block in enumerate(before):
            plain = edited(noise(SMALL, at), 3, b"?")
            (span,) = await rig.complete(span_of((plain, block.id)))
            assert span.delta_blocks == 0
            check([span], [[plain]], shelf)

    assert rig.coder.every == 1
    asyncio.run(run())
    rig.executor.shutdown()
    assert rig.coder.every == 0
    assert len(shelf.asked) == 1
    assert rig.damaged == []


def rewritten(count: int, seed: int, shelf: Shelf, *, little: bool) -> list[tuple[bytes, bytes]]:
    """Blocks with their bases: changed a little, or written anew; what they were is on the shelf."""
    blocks = []
    for number in range(seed * 10_000, seed * 10_000 + count):
        before = sealed(noise(300, number))
        shelf.blocks[before.id] = before
        new = noise(300, number)[:-1] + b"!" if little else noise(300, -1 - number)
        blocks.append((new, before.id))
    return blocks


def test_a_span_of_many_candidates_finds_out_for_itself() -> None:
    rig = Rig(Shelf())
    kinds = [True, False, False, True, False, True, False]
    blocks = [rewritten(100, seed, rig.shelf, little=little) for seed, little in enumerate(kinds)]
    spans = rig.run(*[span_of(*each) for each in blocks])
    check(spans, [[plain for plain, _ in each] for each in blocks], rig.shelf)
    assert [span.delta_blocks for span in spans] == [100 if little else 0 for little in kinds]
    in_vain = 100 // (100 // 8) + 1
    assert sum(map(len, rig.shelf.asked)) == sum(100 if little else in_vain for little in kinds)


def test_where_deltas_do_not_pay_sealers_leave_little_until_they_do() -> None:
    rig = Rig(Shelf())
    written = [rewritten(64, seed, rig.shelf, little=False) for seed in range(SPANS_IN_VAIN_MAX)]
    thinned = rewritten(4, 20, rig.shelf, little=False)
    paying = rewritten(4, 21, rig.shelf, little=True)

    async def run() -> None:
        for each in written:
            assert rig.coder.every == 1
            await rig.complete(span_of(*each))
        for each, before, after in ((thinned, PROBE_EVERY, PROBE_EVERY), (paying, PROBE_EVERY, 1)):
            assert rig.coder.every == before
            (span,) = await rig.complete(span_of(*each), every=PROBE_EVERY)
            check([span], [[plain for plain, _ in each]], rig.shelf)
            assert rig.coder.every == after

    asyncio.run(run())
    rig.executor.shutdown()
    assert sum(map(len, rig.shelf.asked)) == SPANS_IN_VAIN_MAX * 8 + 8


def test_scattered_candidates_go_by_others_like_them() -> None:
    rig = Rig(Shelf())
    count = 6 * TRIES_FIRST
    blocks = rewritten(count, 0, rig.shelf, little=False)
    later = rewritten(8 * TRIES_FIRST * PROBE_EVERY // 4, 1, rig.shelf, little=True)

    async def run() -> None:
        for each in (blocks, later):
            for at in range(0, len(each), 2):
                (span,) = await rig.complete(span_of(*each[at : at + 2]))
                check([span], [[plain for plain, _ in each[at : at + 2]]], rig.shelf)
            made.append(span.delta_blocks)
            asked.append(sum(map(len, rig.shelf.asked)))

    made: list[int] = []
    asked: list[int] = []
    asyncio.run(run())
    rig.executor.shutdown()
    assert made == [0, 2]
    assert TRIES_FIRST <= asked[0] < TRIES_FIRST + count // 4


@given(st.lists(st.booleans(), min_size=TRIES_FIRST, max_size=600))
@example([True] * TRIES_FIRST)
def test_trials_follow_what_the_recent_tries_made(outcomes: list[bool]) -> None:
    trials = Trials()
    assert sum(trials.begin(10) for _ in range(20)) == TRIES_FIRST
    for at, outcome in enumerate(outcomes):
        assert trials.known == (at >= TRIES_FIRST)
        assert trials.known or trials.scattered_every == 1
        trials.note(1, int(outcome))
    assert trials.scattered_every in (1, PROBE_EVERY)
    for paid, every in ((True, 1), (False, PROBE_EVERY), (True, 1)):
        # Of what was remembered a quarter is left after 132 more at the latest; halves are rounded up.
        for _ in range(3 * TRIES_FIRST):
            trials.note(1, int(paid))
        assert trials.scattered_every == every
    assert trials.every == 1


def test_a_span_leaves_waiting_what_had_another_block_before() -> None:
    source = MemorySource(noise(6 * SMALL))
    context = SpanContext(RING, RING.sealer(Kind.VOLUME, EPOCH), Codec.ZSTD, FingerprintCache(), frozenset())
    parent = {
        0: (RING.fingerprint(bytes(source.data[:SMALL])), (b"0" * 32, b"")),  # unchanged
        1: (b"f" * 32, (b"1" * 32, b"")),
        2: (b"f" * 32, (b"2" * 32, b"B" * 32)),  # a delta itself
    }
    base = {2: (b"f" * 32, (b"x" * 32, b"")), 3: (b"f" * 32, (b"3" * 32, b""))}
    for every, expected in ((1, {1: b"1" * 32, 2: b"B" * 32, 3: b"3" * 32}), (0, {})):
        context.cache.__init__()  # type: ignore[misc]
        span = seal_volume_span(
            context,
            source,
            leaf_offset=0,
            first_slot=0,
            end_slot=6,
            block_bytes=SMALL,
            parent=parent,
            base=base,
            delta_every=every,
        )
        assert {item.position: item.base_id for item in span.waiting} == expected
        assert all(item.plain == source.data[item.position * SMALL :][:SMALL] for item in span.waiting)
        assert [at for at, reference in enumerate(span.references) if reference == UNSEALED] == list(expected)
        assert len(span.new) == 5 - len(expected)
        assert span.changed_blocks == 5
