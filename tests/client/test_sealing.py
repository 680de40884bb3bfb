"""Processes that seal: the same spans as in threads, errors and deaths told plainly, nothing left behind."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast import ErrorCode, RawFileSource
from holdfast.descriptors import RawReader
from holdfast.sealing import SealingPool
from holdfast.sealing_messages import (
    SLOT_BYTES,
    SLOTS,
    ArenaSealer,
    SpanRequest,
    pack_entries,
    pack_span,
    unpack_answer,
    unpack_entries,
)
from holdfast.spans import FingerprintCache, Made, SealedSpan, SpanContext, SpanOf, leaf_entries, seal_volume_span
from holdfast_core.model.block import Codec, Kind
from holdfast_core.model.keys import KeyRing, generate_secrets
from holdfast_core.model.tree import VolumeLeaf
from tests.client.rig import BLOCK, error_of, make_sparse, noise
from tests.support.waiting import wait_until

MIB = 1 << 20
WAIT_S = 30.0
SECRETS = generate_secrets(1, os.urandom)
RING = KeyRing(SECRETS)
KEYS = RING.volume_keys(1)


@pytest.fixture(scope="module")
def pool() -> Iterator[SealingPool]:
    """Two processes that take spans."""
    pool = SealingPool(2)
    pool.started.result(WAIT_S)
    yield pool
    pool.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Text, noise, a hole, a repetition of what came before, and an end that is no whole block."""
    text = b"the quick brown fox " * 20_000
    pieces = [(0, text), (5 * BLOCK, noise(2 * MIB)), (9 * MIB, noise(MIB, 1)), (17 * MIB, noise(2 * MIB) + text)]
    return make_sparse(tmp_path / "disk", 20 * MIB + 777, pieces)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that waits for its parent to look at it counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def status_kib(pid: int, name: str) -> int:
    """A figure of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def span_request(volume: int, leaf: int = 0, **changes: object) -> SpanRequest:
    """A whole leaf of small blocks that nothing is known of."""
    request = SpanRequest(volume, leaf * 128 * BLOCK, 0, 128, BLOCK, None, None)
    return replace(request, **changes)  # type: ignore[arg-type]


def leaf_of(span: SealedSpan) -> VolumeLeaf:
    """The index leaf that a span makes."""
    ids = tuple(block_id for block_id, _ in span.references)
    return VolumeLeaf(tuple(span.slots), tuple(span.fingerprints), ids, tuple(base for _, base in span.references))


def sealed_with(context: SpanContext[Made], source: RawReader, request: SpanRequest) -> SpanOf[Made]:
    """What a context makes of a request."""
    return seal_volume_span(
        context,
        source,
        leaf_offset=request.leaf_offset,
        first_slot=request.first_slot,
        end_slot=request.end_slot,
        block_bytes=request.block_bytes,
        parent=unpack_entries(request.parent),
        base=unpack_entries(request.base),
        delta_every=request.delta_every,
    )


def in_threads(source: RawReader, request: SpanRequest, cache: FingerprintCache) -> SealedSpan:
    """What this process makes of a request."""
    return sealed_with(SpanContext(RING, KEYS.sealer(), Codec.ZSTD, cache, frozenset()), source, request)


def test_lent_keys_seal_and_fingerprint_as_the_ring_does() -> None:
    plain = noise(BLOCK)
    assert KEYS.fingerprint(plain) == RING.fingerprint(plain)
    ours = RING.sealer(Kind.VOLUME, 1).seal(plain, codec=Codec.ZSTD)
    assert KEYS.sealer().seal(plain, codec=Codec.ZSTD) == ours
    assert KEYS.cipher_key.hex() not in repr(KEYS)
    assert error_of(lambda: RING.volume_keys(2)).code is ErrorCode.KEY_MISMATCH
    assert error_of(lambda: KeyRing(SECRETS.without_data()).volume_keys(1)).code is ErrorCode.KEY_MISMATCH


def test_a_process_makes_of_a_span_what_a_thread_makes(disk: Path) -> None:
    # One process, so that it meets the repetition as the thread does.
    alone = SealingPool(1)
    reader = RawFileSource(disk).shared()
    volume = alone.open_volume(reader, session=1, codec=Codec.ZSTD, keys=KEYS)
    cache = FingerprintCache()
    spans = [alone.submit(span_request(volume, leaf)).result(WAIT_S) for leaf in range(3)]
    expected = [in_threads(reader, span_request(volume, leaf), cache) for leaf in range(3)]
    assert spans == expected
    # Blocks compare by id alone.
    assert [block.data for span in spans for block, _ in span.new] == [
        block.data for span in expected for block, _ in span.new
    ]
    assert spans[2].reused_bytes > 0
    alone.close()


@pytest.mark.parametrize("block_bytes", [16 * 1024, MIB])
def test_what_is_known_is_known_in_a_process_too(pool: SealingPool, disk: Path, block_bytes: int) -> None:
    reader = RawFileSource(disk).shared()
    first = in_threads(reader, span_request(0, block_bytes=block_bytes, end_slot=8), FingerprintCache())
    leaf = leaf_of(first)
    based = replace(leaf, base_ids=(b"b" * 32, *leaf.base_ids[1:]))
    half = replace(
        leaf, **{name: getattr(leaf, name)[:2] for name in ("slots", "fingerprints", "block_ids", "base_ids")}
    )
    for number, (parent, base) in enumerate([(based, None), (half, based), (None, based)]):
        volume = pool.open_volume(reader, session=100 + number, codec=Codec.ZSTD, keys=KEYS)
        request = span_request(
            volume,
            end_slot=8,
            block_bytes=block_bytes,
            parent=pack_entries(parent, ()),
            base=pack_entries(base, ()),
        )
        assert pool.submit(request).result(WAIT_S) == in_threads(reader, request, FingerprintCache())
        pool.forget(100 + number)


def test_blocks_that_wait_for_a_base_come_behind_those_that_are_sealed(pool: SealingPool, disk: Path) -> None:
    reader = RawFileSource(disk).shared()
    leaf = leaf_of(in_threads(reader, span_request(0), FingerprintCache()))
    strangers = replace(leaf, fingerprints=tuple(noise(32, at) for at in range(len(leaf.slots))))
    volume = pool.open_volume(reader, session=150, codec=Codec.ZSTD, keys=KEYS)
    request = span_request(volume, base=pack_entries(strangers, ()), delta_every=2)
    expected = in_threads(reader, request, FingerprintCache())
    assert expected.waiting
    assert expected.new
    assert pool.submit(request).result(WAIT_S) == expected
    pool.forget(150)


def test_entries_of_damaged_blocks_do_not_travel() -> None:
    ids = tuple(bytes([number]) * 32 for number in range(1, 6))
    leaf = VolumeLeaf((0, 3, 7, 90, 127), ids, tuple(reversed(ids)), (b"", ids[0], b"", ids[2], b""))
    for damaged in (frozenset[bytes](), frozenset([ids[0]]), frozenset(ids[2:]), frozenset(ids)):
        assert unpack_entries(pack_entries(leaf, damaged)) == leaf_entries(leaf, damaged)
    assert unpack_entries(pack_entries(None, ())) == {}


@pytest.mark.parametrize("at", ["head", "tail"])
def test_bytes_that_are_not_the_block_are_no_block(disk: Path, at: str) -> None:
    reader = RawFileSource(disk).shared()
    arena = memoryview(bytearray(SLOT_BYTES))
    sealer = ArenaSealer(KEYS.sealer())
    sealer.begin(arena)
    placed = SpanContext(RING, sealer, Codec.ZSTD, FingerprintCache(), frozenset())
    packet = pack_span(sealed_with(placed, reader, span_request(0)), arena)
    span = in_threads(reader, span_request(0), FingerprintCache())
    assert unpack_answer(packet, arena) == span
    assert [block.data for block, _ in unpack_answer(packet, arena).new] == [block.data for block, _ in span.new]
    first, second = (len(block.data) for block, _ in span.new[:2])
    arena[first if at == "head" else first + second - 1] ^= 1
    error = error_of(lambda: unpack_answer(packet, arena))
    assert error.code is ErrorCode.CORRUPT
    assert error.block_ids == (span.new[1][0].id,)


def test_what_a_source_says_comes_through(pool: SealingPool, tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "disk", 8 * MIB, [(0, noise(8 * MIB))])
    still, live = RawFileSource(path).shared(), RawFileSource(path, live=True).shared()
    os.truncate(path, MIB)
    # A descriptor that does not read: what a device that fails looks like.
    other = os.open(tmp_path / "locked", os.O_WRONLY | os.O_CREAT)
    os.write(other, b"x" * BLOCK)
    locked = RawReader(other, name="locked", size_bytes=BLOCK, live=False)
    results = {}
    for name, reader in (("still", still), ("live", live), ("locked", locked)):
        volume = pool.open_volume(reader, session=200, codec=Codec.ZSTD, keys=KEYS)
        results[name] = pool.submit(span_request(volume))
    assert results["live"].result(WAIT_S).slots == list(range(16))
    assert results["still"].result(WAIT_S).slots == list(range(16))
    error = error_of(lambda: results["locked"].result(WAIT_S))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "locked" in error.message
    with pytest.raises(type(error), match="changed while it was read"):
        still.read_into(2 * MIB, memoryview(bytearray(1)))
    os.close(other)
    pool.forget(200)


def test_secrets_and_settings_are_not_to_be_seen(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    monkeypatch.setenv("HOLDFAST_ETCD_PASSWORD", "hunter2")
    alone = SealingPool(1)
    alone.started.result(WAIT_S)
    volume = alone.open_volume(RawFileSource(disk).shared(), session=1, codec=Codec.ZSTD, keys=KEYS)
    assert alone.submit(span_request(volume)).result(WAIT_S).new
    (pid,) = alone.pids
    seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert b"holdfast.sealing_worker" in seen
    secrets = [KEYS.cipher_key, KEYS.nonce_key, KEYS.fingerprint_key, *SECRETS.data_epochs.values()]
    for secret in secrets:
        assert secret not in seen
        assert secret.hex().encode() not in seen
        assert base64.b64encode(secret) not in seen
    assert b"hunter2" not in seen
    alone.close()


def test_a_process_has_no_descriptor_but_its_own(pool: SealingPool, disk: Path) -> None:
    with disk.open("rb") as ours:
        os.set_inheritable(ours.fileno(), True)
        late = SealingPool(1)
        late.started.result(WAIT_S)
        targets = [os.readlink(entry) for entry in Path(f"/proc/{late.pids[0]}/fd").iterdir()]
        late.close()
    kinds = sorted(target.partition(":")[0] for target in targets)
    assert kinds == ["/dev/null", "/memfd", "/memfd", "socket"]


def test_an_interrupt_of_the_terminal_is_not_theirs(pool: SealingPool, disk: Path) -> None:
    early = SealingPool(1)
    os.kill(early.pids[0], signal.SIGINT)
    early.started.result(WAIT_S)
    os.kill(early.pids[0], signal.SIGINT)
    volume = early.open_volume(RawFileSource(disk).shared(), session=1, codec=Codec.ZSTD, keys=KEYS)
    assert early.submit(span_request(volume)).result(WAIT_S).new
    early.close()


def test_closing_ends_them_and_what_waits(disk: Path) -> None:
    closed = SealingPool(2)
    volume = closed.open_volume(RawFileSource(disk).shared(), session=1, codec=Codec.ZSTD, keys=KEYS)
    futures = [closed.submit(span_request(volume)) for _ in range(8)]
    assert futures[-1].cancel()
    closed.close()
    assert all(future.done() for future in futures)
    assert error_of(lambda: closed.submit(span_request(volume)).result(WAIT_S)).code is ErrorCode.CANCELLED
    # Not even zombies: their parent has looked.
    assert not any(Path(f"/proc/{pid}").exists() for pid in closed.pids)


def test_they_end_with_a_parent_that_was_killed() -> None:
    program = (
        "import time\n"
        "from holdfast.sealing import SealingPool\n"
        "pool = SealingPool(2)\n"
        "pool.started.result()\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(is_gone(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the end of the processes")


def test_one_that_is_killed_fails_all_that_is_asked(disk: Path) -> None:
    broken = SealingPool(2)
    broken.started.result(WAIT_S)
    volume = broken.open_volume(RawFileSource(disk).shared(), session=1, codec=Codec.ZSTD, keys=KEYS)
    os.kill(broken.pids[0], signal.SIGSTOP)
    futures = [broken.submit(span_request(volume)) for _ in range(12)]
    os.kill(broken.pids[0], signal.SIGKILL)
    errors = [error for future in futures if (error := future.exception(WAIT_S)) is not None]
    assert len(errors) >= SLOTS
    for error in (*errors, error_of(lambda: broken.submit(span_request(volume)).result(WAIT_S))):
        assert getattr(error, "code", None) is ErrorCode.INTERNAL
        assert "SIGKILL" in str(error)
    broken.close()
    assert all(is_gone(pid) for pid in broken.pids)


def test_a_crash_is_told_in_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho there is no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    pool = SealingPool(1)
    error = pool.started.exception(WAIT_S)
    assert getattr(error, "code", None) is ErrorCode.INTERNAL
    assert "exit code 3: there is no such module" in str(error)
    pool.close()


@pytest.mark.parametrize("executable", ["", "/usr/sbin/uwsgi", "python-that-is-not-there"])
def test_where_there_is_no_interpreter_to_start(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    error = error_of(lambda: SealingPool(2))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert 'sealing="auto"' in error.message


def test_memory_is_flat(pool: SealingPool, tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "disk", 32 * MIB, [(0, noise(32 * MIB))])
    reader = RawFileSource(path).shared()
    for session in range(300, 306):
        volume = pool.open_volume(reader, session=session, codec=Codec.STORED, keys=KEYS)
        futures = [pool.submit(span_request(volume, leaf)) for leaf in range(4)]
        assert sum(len(future.result(WAIT_S).new) for future in futures) == 512
        pool.forget(session)
    assert SLOTS * SLOT_BYTES < 17 * MIB
    for pid in pool.pids:
        # The interpreter and its libraries, a span's buffer, and both slots of the arena.
        assert status_kib(pid, "VmHWM") < 80 * 1024
        # Forgetting is not waited for; a volume that stayed open would be a fifth descriptor.
        wait_until(lambda pid=pid: len(list(Path(f"/proc/{pid}/fd").iterdir())) == 4, "closed files")  # type: ignore[misc]
