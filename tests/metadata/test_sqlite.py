"""What only the embedded engine has: its file and lock, its clock, its thread, and death at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.metadata.hub import BATCHES_WAITING_MAX
from holdfast_core.runtime.metadata.sqlite import IN_MEMORY, SqliteStore
from holdfast_core.runtime.metadata.store import OUTCOME_FACT, OUTCOME_UNAPPLIED, OUTCOME_UNKNOWN, Absent, Put

_SOON_S = 30.0

# Writes pairs of keys, and prints the number of each pair once its transaction is acknowledged.
_WRITER = """
import asyncio, sys
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put

async def main():
    store = await SqliteStore.open(sys.argv[1], SystemClock())
    async def write(first):
        for number in range(first, 1_000_000, 4):
            await store.txn([], [Put(f"a/{number}", b"x" * 2000), Put(f"b/{number}", b"")])
            print(number, flush=True)
    await asyncio.gather(*map(write, range(4)))

asyncio.run(main())
"""

# Opens the store, forbids files to grow beyond what they have, and prints what then becomes of transactions.
_STARVED_WRITER = """
import asyncio, resource, signal, sys
from holdfast_core.model.errors import HoldfastError
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = await SqliteStore.open(sys.argv[1], SystemClock())
    await store.txn([], [Put("acknowledged", b"")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            await store.txn([], [Put("large", bytes(500_000))])
        except HoldfastError as error:
            print(error.code.name, error.facts["outcome"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.close()

asyncio.run(main())
"""


def _run_python(program: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)


def _modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


async def _read_all(path: Path) -> None:
    store = await SqliteStore.open(path, SystemClock())
    try:
        await store.snapshot([""])
    finally:
        await store.close()


async def _open_error(path: Path) -> HoldfastError:
    with pytest.raises(HoldfastError) as caught:
        await SqliteStore.open(path, SystemClock())
    return caught.value


class TestDurability:
    @pytest.mark.parametrize("acknowledgements", [1, 40, 400])
    async def test_kill_keeps_every_acknowledged_transaction(self, tmp_path: Path, acknowledgements: int) -> None:
        path = tmp_path / "metadata.db"
        writer = _run_python(_WRITER, path)
        assert writer.stdout is not None
        try:
            acknowledged = [int(writer.stdout.readline()) for _ in range(acknowledgements)]
        finally:
            writer.send_signal(signal.SIGKILL)
            # What was printed before the kill is still in the pipe; a last line may be cut.
            acknowledged += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line[-1] == "\n"]
            writer.wait()
        store = await SqliteStore.open(path, SystemClock())
        firsts = {item.key[2:] for item in (await store.snapshot(["a/"])).items}
        seconds = {item.key[2:] for item in (await store.snapshot(["b/"])).items}
        await store.close()
        assert firsts == seconds
        assert {str(number) for number in acknowledged} <= firsts
        # At most one transaction was under way unanswered for each of the four tasks.
        assert len(firsts) <= len(acknowledged) + 4

    async def test_revisions_and_items_survive_a_restart(self, tmp_path: Path) -> None:
        path = tmp_path / "metadata.db"
        store = await SqliteStore.open(path, SystemClock())
        await store.txn([], [Put("k", b"1")])
        before = (await store.txn([], [Put("k", b"2")])).revision
        item = await store.get("k")
        await store.close()
        store = await SqliteStore.open(path, SystemClock())
        assert await store.get("k") == item
        assert (await store.txn([], [Put("l", b"")])).revision == before + 1
        await store.close()

    async def test_an_io_error_stops_the_store_until_it_is_opened_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "metadata.db"
        writer = _run_python(_STARVED_WRITER, path)
        output, _ = writer.communicate()
        assert output.splitlines() == [f"UNREACHABLE {OUTCOME_UNKNOWN}", f"UNREACHABLE {OUTCOME_UNAPPLIED}"]
        store = await SqliteStore.open(path, SystemClock())
        assert [item.key for item in (await store.snapshot([""])).items] == ["acknowledged"]
        await store.close()

    async def test_a_full_disk_is_said_plainly_and_passes(self, tmp_path: Path) -> None:
        store = await SqliteStore.open(tmp_path / "metadata.db", SystemClock())
        await store.txn([], [Put("before", b"")])
        # SQLite's own bound on the file stands in for the disk's: it raises the same SQLITE_FULL.
        await store._on_tables(lambda tables: tables._connection.execute("PRAGMA max_page_count = 20").fetchall())
        with pytest.raises(HoldfastError) as caught:
            await store.txn([], [Put("large", bytes(500_000))])
        assert (caught.value.code, caught.value.facts[OUTCOME_FACT]) == (ErrorCode.DISK_FULL, OUTCOME_UNAPPLIED)
        assert [item.key for item in (await store.snapshot([""])).items] == ["before"]
        await store._on_tables(lambda tables: tables._connection.execute("PRAGMA max_page_count = 20000").fetchall())
        await store.txn([], [Put("large", bytes(500_000))])
        await store.close()


class TestReading:
    async def test_a_read_costs_what_it_finds_and_not_what_the_table_has_behind_it(self) -> None:
        store = await SqliteStore.open(IN_MEMORY, SystemClock())
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1

        def counted() -> int:
            """Steps of SQLite's machine since the last call."""
            nonlocal steps
            before, steps = steps, 0
            return before

        await store.txn([], [Put("a/1", b"")])
        for hundred in range(40):
            await store.txn([], [Put(f"b/{hundred:02}{one:02}", b"") for one in range(100)])
        await store._on_tables(lambda tables: tables._connection.set_progress_handler(step, 1))
        assert [item.key for item in (await store.snapshot(["a/"])).items] == ["a/1"]
        assert counted() < 200
        page = await store.page("b/", after="b/3000", limit=2)
        assert [item.key for item in page.items] == ["b/3001", "b/3002"]
        assert counted() < 200
        async for scanned in store.scan(["a/"], page_items=10):
            assert [item.key for item in scanned.items] == ["a/1"]
        assert counted() < 1000
        assert len((await store.snapshot([""])).items) == 4001
        assert counted() > 4000, "steps are counted"
        await store.close()


class TestFile:
    async def test_a_second_opener_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "metadata.db"
        store = await SqliteStore.open(path, SystemClock())
        error = await _open_error(path)
        assert error.code is ErrorCode.BUSY
        assert error.facts["pid"] == str(os.getpid())
        assert str(path) in error.message
        await store.close()
        await (await SqliteStore.open(path, SystemClock())).close()

    async def test_another_process_is_refused_until_the_holder_dies(self, tmp_path: Path) -> None:
        path = tmp_path / "metadata.db"
        holder = _run_python(_WRITER, path)
        assert holder.stdout is not None
        try:
            holder.stdout.readline()
            error = await _open_error(path)
            assert (error.code, error.facts["pid"]) == (ErrorCode.BUSY, str(holder.pid))
        finally:
            holder.kill()
            holder.communicate()
        await (await SqliteStore.open(path, SystemClock())).close()

    async def test_stray_tools_are_kept_off(self, tmp_path: Path) -> None:
        path = tmp_path / "metadata.db"
        store = await SqliteStore.open(path, SystemClock())
        await store.txn([], [Put("k", b"")])
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as tool, pytest.raises(sqlite3.OperationalError):
            tool.execute("DELETE FROM items")
        await store.close()
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as tool:
            tool.execute("BEGIN IMMEDIATE")
            assert (await _open_error(path)).code is ErrorCode.BUSY

    async def test_files_are_for_their_owner_only(self, tmp_path: Path) -> None:
        store = await SqliteStore.open(tmp_path / "metadata.db", SystemClock())
        await store.txn([], [Put("k", b"")])
        modes = _modes(tmp_path)
        await store.close()
        assert modes == {"metadata.db": 0o600, "metadata.db-wal": 0o600, "metadata.db.lock": 0o600}

    async def test_what_is_no_store_is_left_alone(self, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_bytes(b"something else" * 100)
        assert (await _open_error(text)).code is ErrorCode.CORRUPT
        assert text.read_bytes() == b"something else" * 100
        foreign = tmp_path / "foreign.db"
        with contextlib.closing(sqlite3.connect(foreign)) as connection:
            connection.execute("CREATE TABLE t (x)")
        assert (await _open_error(foreign)).code is ErrorCode.MISMATCH
        newer = tmp_path / "newer.db"
        await (await SqliteStore.open(newer, SystemClock())).close()
        with contextlib.closing(sqlite3.connect(newer)) as connection:
            connection.execute("PRAGMA user_version = 2")
        assert (await _open_error(newer)).code is ErrorCode.MISMATCH
        assert (await _open_error(tmp_path / "no such directory" / "metadata.db")).code is ErrorCode.INVALID_ARGUMENT
        assert (await _open_error(tmp_path)).code is ErrorCode.INVALID_ARGUMENT

    async def test_rot_is_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "metadata.db"
        store = await SqliteStore.open(path, SystemClock())
        for number in range(100):
            await store.txn([], [Put(f"k{number}", b"x" * 1000)])
        await store.close()
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (path.stat().st_size - 4096))
        with pytest.raises(HoldfastError) as caught:
            await _read_all(path)
        assert caught.value.code is ErrorCode.CORRUPT


class TestLeaseClock:
    async def test_a_lease_ends_when_its_term_has_run(self) -> None:
        clock = ManualClock()
        store = await SqliteStore.open(IN_MEMORY, clock)
        short, long = await store.grant_lease(5), await store.grant_lease(60)
        await store.txn([], [Put("short", b"", short), Put("long", b"", long)])
        clock.advance(4.9)
        assert await store.lease_left(short) == pytest.approx(0.1)
        assert await store.keep_lease(short) == 5
        clock.advance(4.9)
        assert await store.get("short") is not None
        clock.advance(0.1)
        assert await store.get("short") is None
        assert await store.get("long") is not None
        await store.close()

    async def test_watchers_learn_of_it_by_the_clock_alone(self) -> None:
        clock = ManualClock()
        store = await SqliteStore.open(IN_MEMORY, clock)
        later, sooner = await store.grant_lease(60), await store.grant_lease(5)
        await store.txn([], [Put("later", b"", later), Put("sooner", b"", sooner)])
        async with contextlib.aclosing(store.watch("")) as batches, asyncio.timeout(_SOON_S):
            await anext(batches)
            clock.advance(5)
            assert (await anext(batches)).deletes == ("sooner",)
            clock.advance(55)
            assert (await anext(batches)).deletes == ("later",)
        await store.close()

    async def test_each_lease_has_a_full_term_after_a_restart(self, tmp_path: Path) -> None:
        path, clock = tmp_path / "metadata.db", ManualClock()
        store = await SqliteStore.open(path, clock)
        lease_id = await store.grant_lease(10)
        ended = await store.grant_lease(10)
        await store.revoke_lease(ended)
        await store.txn([], [Put("k", b"", lease_id)])
        clock.advance(9)
        await store.close()
        clock.advance(1000)
        store = await SqliteStore.open(path, clock)
        assert await store.lease_left(lease_id) == 10
        assert await store.grant_lease(10) not in (lease_id, ended)
        clock.advance(9)
        assert await store.get("k") is not None
        clock.advance(1)
        assert await store.get("k") is None
        await store.close()


class TestThread:
    async def test_the_event_loop_turns_while_the_store_works(self, tmp_path: Path) -> None:
        store = await SqliteStore.open(tmp_path / "metadata.db", SystemClock())
        writing = asyncio.create_task(store.txn([], [Put("k", bytes(1 << 20))]))
        turns = 0
        while not writing.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 1
        assert (await writing).succeeded
        await store.close()

    async def test_what_a_cancelled_caller_committed_is_still_published(self) -> None:
        store = await SqliteStore.open(IN_MEMORY, SystemClock())
        async with contextlib.aclosing(store.watch("")) as batches, asyncio.timeout(_SOON_S):
            revision = (await anext(batches)).revision
            for number in range(200):
                task = asyncio.create_task(store.txn([Absent(f"k{number}")], [Put(f"k{number}", b"")]))
                for _ in range(number % 4):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            final = await store.snapshot([""])
            seen: list[str] = []
            while revision < final.revision:
                batch = await anext(batches)
                revision = batch.revision
                seen += [item.key for item in batch.puts]
        assert sorted(seen) == [item.key for item in final.items]
        await store.close()

    async def test_a_watcher_that_falls_behind_lists_again(self) -> None:
        store = await SqliteStore.open(IN_MEMORY, SystemClock())
        async with contextlib.aclosing(store.watch("")) as batches, asyncio.timeout(_SOON_S):
            await anext(batches)
            total = BATCHES_WAITING_MAX + 10
            for number in range(total):
                await store.txn([], [Put(f"k{number % 7}", str(number).encode())])
            listing = await anext(batches)
            assert listing.relisted
            assert len(listing.puts) == 7
            later = (await store.txn([], [Put("k0", b"later")])).revision
            batch = await anext(batches)
            assert (batch.revision, batch.relisted) == (later, False)
        await store.close()
