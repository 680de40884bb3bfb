"""`holdfast node`, `nodes`, `layout` and `status`, of nodes that say what the test wants them to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import main
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.credentials import write_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1.common_pb2 import NodeHealing
from tests.coordinator.rig import ADMIN_TOKEN, PARTITIONS, Client, add_stopped_node, coordinator

PLACES = 3 * PARTITIONS


@dataclass
class Rig:
    """A cluster of four nodes with three copies whose nodes are nobody, and the command."""

    client: Client
    store: SqliteStore
    token: Path
    capsys: pytest.CaptureFixture[str]

    async def run(self, *arguments: str, code: int = 0) -> str:
        """Return what a command prints: on stdout, or on stderr where it is to fail."""
        shared = ["--coordinator", self.client.address, "--token-file", str(self.token)]
        ended = await asyncio.to_thread(main.run, [*shared, *arguments])
        captured = self.capsys.readouterr()
        assert ended == code, captured.err
        return captured.err if code else captured.out

    async def json(self, *arguments: str) -> Any:
        """Return what a command prints for programs."""
        return json.loads(await self.run(*arguments, "--json"))


@pytest.fixture
async def rig(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Rig]:
    clock = ManualClock()
    store = await SqliteStore.open(":memory:", clock)
    token = tmp_path / "token"
    write_token(token, ADMIN_TOKEN)
    async with coordinator(store, clock=clock, nodes=4) as client:
        await client.form_layout(4)
        yield Rig(client, store, token, capsys)
    await store.close()


async def test_a_drain_is_shown_first_and_then_done(rig: Rig) -> None:
    planned = await rig.run("node", "drain", "node-2", "--dry-run")
    assert f"of {PLACES} places move" in planned
    assert "nothing has changed" in planned
    assert [node["draining"] for node in await rig.json("nodes")] == [False] * 4
    done = await rig.json("node", "drain", "node-2")
    assert done["applied"] is True
    assert set(done["plan"]["layout"]["slots"]) == {"node-1", "node-3", "node-4"}
    assert "node-2  up, draining" in await rig.run("nodes")
    assert "done; `holdfast layout show`" in await rig.run("node", "undrain", "node-2")
    assert (await rig.json("layout", "show"))["layouts"][0]["slots"].keys() >= {"node-2"}
    assert "the layout stays as it is" in await rig.run("node", "undrain", "node-2")


async def test_a_weight_is_a_size_and_0_takes_it_back(rig: Rig) -> None:
    await rig.run("node", "weight", "node-4", "256GiB")
    assert [node["weight_bytes"] for node in await rig.json("nodes")] == [0, 0, 0, 256 << 30]
    back = await rig.json("node", "weight", "node-4", "0")
    assert back["applied"] is True
    assert [node["weight_bytes"] for node in await rig.json("nodes")] == [0] * 4
    assert "is not a size" in await rig.run("node", "weight", "node-4", "much", code=2)


async def test_removals_say_what_has_to_happen_first(rig: Rig) -> None:
    assert "drain it first with `holdfast node drain`" in await rig.run("node", "remove", "node-1", code=5)
    assert "there is no node node-9" in await rig.run("node", "remove", "node-9", code=3)
    for name in ("node-8", "node-9"):
        await add_stopped_node(rig.store, name)
    assert await rig.run("node", "remove", "node-9") == "node-9 is removed\n"
    assert await rig.json("node", "remove", "node-8", "--lost") == {"removed": "node-8"}
    assert [node["node_id"] for node in await rig.json("nodes")] == [f"node-{number}" for number in (1, 2, 3, 4)]


async def test_a_layout_shows_how_far_it_has_come(rig: Rig) -> None:
    assert (await rig.run("layout", "show")).splitlines()[-1] == "settled: nothing is on its way"
    await rig.run("node", "drain", "node-2")
    half = NodeHealing(partitions=PARTITIONS, partitions_synced=10, partitions_at_risk=2)
    await rig.client.beat(1, layout_epoch=2, healing=NodeHealing(synced_epoch=2))
    await rig.client.beat(3, layout_epoch=2, healing=half)
    lines = (await rig.run("layout", "show")).splitlines()
    assert lines[0].startswith("layout 2: ")
    assert lines[-2] == "layout 1 is alive until what it holds is where layout 2 wants it"
    assert lines[-1] == (
        f"{PARTITIONS + 10} of {PLACES} places have all that they hold; 2 wait for former owners that cannot be reached"
    )
    shown = (await rig.json("layout", "show"))["progress"]
    assert shown == {"epoch": 2, "living": 2, "slots": PLACES, "synced": PARTITIONS + 10, "at_risk": 2}
    assert f"node-3  up, syncing 10/{PARTITIONS}, at risk 2" in await rig.run("nodes")


async def test_status_says_that_it_heals_or_is_at_risk(rig: Rig) -> None:
    assert (await rig.json("status"))["state"] == "ready"
    await rig.run("node", "drain", "node-2")
    await rig.client.beat(1, layout_epoch=2, healing=NodeHealing(synced_epoch=2))
    await rig.client.beat(3, layout_epoch=2, healing=NodeHealing(partitions=PARTITIONS, partitions_synced=10))
    healing = await rig.json("status")
    assert healing["state"] == (
        f"healing: {PARTITIONS + 10} of {PLACES} copies of partitions are where layout 2 wants them"
    )
    assert healing["writable"] is True
    await rig.client.beat(4, layout_epoch=2, healing=NodeHealing(partitions_at_risk=3))
    await add_stopped_node(rig.store, "node-7")
    assert (await rig.json("status"))["state"] == (
        "at risk: 3 copies of partitions wait for former owners that cannot be reached; bring back node-7"
    )
    await rig.client.beat(4, layout_epoch=2, healing=NodeHealing(unrepaired_blocks=5))
    state = (await rig.json("status"))["state"]
    assert state == "at risk: 5 copies of blocks are missing or corrupt, and no node that answers has them"
    assert "state" in await rig.run("status")


async def test_history_tells_how_layouts_followed_one_another(rig: Rig) -> None:
    await rig.run("node", "drain", "node-2")
    await rig.run("node", "undrain", "node-2")
    changes = await rig.json("layout", "history")
    assert [(change["epoch"], change["reason"], change["joined"], change["left"]) for change in changes] == [
        (3, "node-2 undrained", ["node-2"], []),
        (2, "node-2 drained", [], ["node-2"]),
        (1, "first layout", [f"node-{number}" for number in (1, 2, 3, 4)], []),
    ]
    assert [bool(change["settled_unix_ms"]) for change in changes] == [False, False, True]
    lines = (await rig.run("layout", "history")).splitlines()
    assert lines[0].split() == ["LAYOUT", "MADE", "SETTLED", "MOVED", "WHY", "NODES"]
    assert "node-2 drained" in lines[2]
    assert lines[2].endswith("-node-2")
