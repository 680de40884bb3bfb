"""`holdfast access` against a real guard and service: what is printed, what is kept, what a mistake leaves behind."""

from __future__ import annotations

import asyncio
import json
import random
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from holdfast.cli import access
from holdfast_core.model.access.policy import DEFAULT_DOCUMENT
from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import new_token, parse_token, write_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from tests.coordinator.access_rig import ADMIN, Authority, Rig, fingerprint, running
from tests.coordinator.rig import refused


@dataclass(slots=True)
class Commands:
    """Runs command lines as an administrator, each in a thread of its own as a process would."""

    rig: Rig
    token_file: Path
    capture: pytest.CaptureFixture[str]

    async def run(self, *arguments: str, token_file: Path | None = None) -> str:
        """Run one and return what it printed."""
        shared = ("--coordinator", self.rig.host.address, "--token-file", str(token_file or self.token_file))
        command = typer.main.get_command(access.app)
        self.capture.readouterr()
        await asyncio.to_thread(command, args=[*arguments, *shared], prog_name="access", standalone_mode=False)
        return self.capture.readouterr().out.rstrip("\n")

    async def json(self, *arguments: str) -> Any:
        """Run one with --json."""
        return json.loads(await self.run(*arguments, "--json"))


@pytest.fixture
async def commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Commands]:
    store = await SqliteStore.open(":memory:", SystemClock())
    token_file = tmp_path / "admin.token"
    write_token(token_file, ADMIN)
    async with running(store, SystemClock()) as rig:
        yield Commands(rig, token_file, capsys)
    await store.close()


async def test_who_am_i(commands: Commands) -> None:
    assert (await commands.run("whoami")).splitlines() == [
        "principal  admin",
        "proven by  token",
        "tenant     default",
        "BOUND  ROLE   TENANT  ON",
        "admin  admin  *       *",
    ]
    shown = await commands.json("whoami")
    assert shown["bindings"] == [{"principal": "admin", "role": "admin", "tenant": "*", "resource": "*"}]


async def test_a_token_is_printed_once_and_works(commands: Commands, tmp_path: Path) -> None:
    text = await commands.run("token", "create", "agent-7", "--days", "2")
    token_id, _ = parse_token(text)
    listed = await commands.json("token", "list")
    assert [(each["token_id"], each["principal"], each["created_by"]) for each in listed] == [
        (token_id, "agent-7", "admin")
    ]
    assert listed[0]["expires_unix_ms"] - listed[0]["created_unix_ms"] == 2 * 86_400_000
    assert text.rpartition("_")[2] not in await commands.run("token", "list")
    table = (await commands.run("token", "list")).splitlines()
    assert (table[0].split(), table[1].split()[:2]) == (
        ["ID", "PRINCIPAL", "MADE", "ENDS", "BY"],
        [token_id, "agent-7"],
    )
    own = tmp_path / "own.token"
    write_token(own, text)
    assert "agent-7" in await commands.run("whoami", token_file=own)
    assert await commands.run("token", "revoke", token_id) == ""
    await refused(ErrorCode.UNAUTHENTICATED, commands.run("whoami", token_file=own))
    await refused(ErrorCode.NOT_FOUND, commands.run("token", "revoke", token_id))


async def test_a_token_goes_to_a_new_file_for_its_owner_alone(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "agent.token"
    assert await commands.run("token", "create", "agent-7", "--output", str(path)) == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "agent-7" in await commands.run("whoami", token_file=path)
    before = path.read_text(encoding="ascii")
    await refused(ErrorCode.TARGET_EXISTS, commands.run("token", "create", "agent-8", "--output", str(path)))
    assert path.read_text(encoding="ascii") == before
    other = tmp_path / "refused.token"
    await refused(ErrorCode.INVALID_ARGUMENT, commands.run("token", "create", "a/b", "--output", str(other)))
    assert not other.exists()
    nowhere = tmp_path / "none" / "x.token"
    await refused(ErrorCode.TARGET_UNWRITABLE, commands.run("token", "create", "agent-7", "--output", str(nowhere)))
    made = await commands.json("token", "create", "agent-9")
    assert parse_token(made["token"])[0] == made["token_id"]


async def test_bindings_come_and_go(commands: Commands) -> None:
    printed = await commands.run("grant", "agent-7", "backup-writer", "--on", "vm/web-*", "--tenant", "blue")
    assert printed == "agent-7 backup-writer on vm/web-* in blue"
    assert await commands.run("grant", "agent-7", "auditor", "--everywhere") == "agent-7 auditor on * everywhere"
    assert await commands.json("grant", "agent-7", "auditor", "--everywhere") == {
        "principal": "agent-7",
        "role": "auditor",
        "tenant": "*",
        "resource": "*",
    }
    shown = json.loads(await commands.run("policy", "show"))
    first = json.loads(DEFAULT_DOCUMENT)["bindings"]
    assert [each["role"] for each in shown["bindings"]] == [
        *(each["role"] for each in first),
        "backup-writer",
        "auditor",
    ]
    rights = commands.rig.view.policy.rights_of("agent-7")
    assert rights.allows("snapshot.create", "blue", "vm/web-1")
    assert not rights.allows("snapshot.create", "default", "vm/web-1")
    error = await refused(ErrorCode.NOT_FOUND, commands.run("ungrant", "agent-7", "backup-writer"))
    assert "agent-7 backup-writer on * in default" in error.message
    await commands.run("ungrant", "agent-7", "backup-writer", "--on", "vm/web-*", "--tenant", "blue")
    assert not commands.rig.view.policy.somewhere("agent-7", "snapshot.create", "blue")
    await refused(ErrorCode.INVALID_ARGUMENT, commands.run("grant", "*", "admin"))
    await refused(ErrorCode.INVALID_ARGUMENT, commands.run("grant", "agent-7", "emperor"))


async def test_bindings_that_are_made_at_once_are_all_made(commands: Commands) -> None:
    names = [f"agent-{number}" for number in range(4)]
    await asyncio.gather(*(commands.run("grant", name, "restorer") for name in names))
    policy = commands.rig.view.policy
    assert all(policy.somewhere(name, "point.restore", "default") for name in names)


async def test_the_policy_is_set_whole(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"format": 1, "bindings": []}\n', encoding="utf-8")
    assert await commands.run("policy", "set", str(path)) == "policy set"
    assert await commands.run("policy", "show") == '{"format": 1, "bindings": []}'
    shown = await commands.json("policy", "show")
    assert shown["document"] == path.read_text(encoding="utf-8")
    for text in (b'{"format": 1}', b"\xff"):
        path.write_bytes(text)
        await refused(ErrorCode.INVALID_ARGUMENT, commands.run("policy", "set", str(path)))
    await refused(ErrorCode.INVALID_ARGUMENT, commands.run("policy", "set", str(tmp_path / "none")))
    assert await commands.json("policy", "show") == shown


async def test_certificates_are_revoked_by_their_file(commands: Commands, tmp_path: Path) -> None:
    authority = Authority()
    ada = authority.issue(tmp_path / "ada", uris=["spiffe://holdfast/admin/ada"])
    nobody = authority.issue(tmp_path / "nobody")
    for files in (ada, nobody):
        assert await commands.run("certificate", "revoke", str(files.cert)) == fingerprint(files).hex()
    listed = {each["fingerprint"]: each["principal"] for each in await commands.json("certificate", "list")}
    assert listed == {fingerprint(ada).hex(): "spiffe://holdfast/admin/ada", fingerprint(nobody).hex(): ""}
    assert (await commands.run("certificate", "list")).splitlines()[0].split() == [
        "FINGERPRINT",
        "PRINCIPAL",
        "REVOKED",
    ]
    for wrong in (ada.key, tmp_path / "none"):
        await refused(ErrorCode.INVALID_ARGUMENT, commands.run("certificate", "revoke", str(wrong)))


async def test_who_may_not_is_told_so(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "agent.token"
    write_token(path, await commands.rig.token_of("agent-7"))
    calls: list[Callable[[], Any]] = [
        lambda: commands.run("token", "list", token_file=path),
        lambda: commands.run("policy", "show", token_file=path),
        lambda: commands.run("grant", "agent-7", "admin", "--everywhere", token_file=path),
    ]
    for call in calls:
        await refused(ErrorCode.DENIED, call())
    write_token(path, new_token(random.randbytes))
    await refused(ErrorCode.UNAUTHENTICATED, commands.run("whoami", token_file=path))
