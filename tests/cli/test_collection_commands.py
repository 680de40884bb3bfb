"""`holdfast gc`, `why` and `reclaimable`, over a cluster of real nodes in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import main
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import write_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from tests.collection.rig import Collecting, collecting
from tests.coordinator.content import random_blocks
from tests.coordinator.rig import ADMIN_TOKEN

SLOTS = random_blocks(1, range(60))


@dataclass
class Rig:
    """A cluster and the command."""

    running: Collecting
    token: Path
    capsys: pytest.CaptureFixture[str]

    async def run(self, *arguments: str, code: int = 0) -> str:
        """Return what a command prints: on stdout, or on stderr where it is to fail."""
        shared = ["--coordinator", self.running.client.address, "--token-file", str(self.token)]
        ended = await asyncio.to_thread(main.run, [*shared, *arguments])
        captured = self.capsys.readouterr()
        assert ended == code, captured.err
        return captured.err if code else captured.out

    async def json(self, *arguments: str) -> Any:
        """Return what a command prints for programs."""
        return json.loads(await self.run(*arguments, "--json"))


@pytest.fixture
async def rig(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Rig]:
    store = await SqliteStore.open(":memory:", SystemClock())
    token = tmp_path / "token"
    write_token(token, ADMIN_TOKEN)
    async with collecting(store) as running:
        yield Rig(running, token, capsys)
    await store.close()


@pytest.mark.slow
async def test_a_dry_run_says_what_goes_and_a_run_does_it(rig: Rig) -> None:
    assert "there was no collection yet" in await rig.run("gc", "--last")
    gone = await rig.running.save(SLOTS)
    await rig.running.forget(gone.record.point_id)
    copies = 3 * len(gone.ids)
    planned = await rig.run("gc", "--dry-run")
    assert f"garbage  {copies} copies" in planned
    assert "freed" not in planned
    done = await rig.run("gc", "--wait")
    assert f"deleted       {copies} copies" in done
    state = await rig.json("gc", "--last")
    assert state["last"]["deleted_copies"] == state["planned"]["garbage_copies"] == copies
    assert state["running"] is None
    again = await rig.json("gc", "--wait")
    assert (again["deleted_copies"], again["phase"]) == (0, "done")


async def test_without_waiting_it_says_how_to_see_it(rig: Rig) -> None:
    assert "collection 2 began" in await rig.run("gc")
    await rig.running.ended(2)
    assert "collection 2" in await rig.run("gc", "--last")


async def test_what_is_left_out_is_said_with_the_reason(rig: Rig) -> None:
    kept = await rig.running.save(SLOTS)
    grant = await rig.running.reader_grant(kept.record)
    await rig.running.cluster.destroy(grant, kept.sealed.index[0].id)
    printed = await rig.run("gc", "--wait")
    assert f"left out: tenant default: the volume root of the point {kept.record.point_id}" in printed


async def test_why_names_holders_and_copies(rig: Rig) -> None:
    kept = await rig.running.save(SLOTS)
    block_id = kept.sealed.blocks[3].id
    printed = await rig.run("why", block_id.hex())
    assert f"{kept.record.point_id}  vm-1        root    data  {3 * 65536}" in printed
    assert printed.count("ok    yes") == 3
    found = await rig.json("why", block_id.hex())
    assert found["holders"][0]["offset_bytes"] == 3 * 65536
    assert "nothing that you may list" in await rig.run("why", "00" * 32)
    assert "64 hexadecimal digits" in await rig.run("why", "abc", code=2)


async def test_reclaimable_says_what_forgetting_frees(rig: Rig) -> None:
    kept = await rig.running.save(SLOTS)
    found = await rig.json("reclaimable", "vm-1")
    assert (found["blocks"], found["estimated"]) == (len(kept.ids), False)
    printed = await rig.run("reclaimable", "vm-1", kept.record.point_id)
    assert kept.record.point_id in printed
    assert f"in {len(kept.ids)} blocks" in printed
    await rig.run("reclaimable", "vm-2", code=3)
