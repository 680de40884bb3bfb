"""`holdfast audit` against a server that keeps a small log, and its verification without any server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from holdfast import VolumeSpec
from holdfast.background import LoopThread
from holdfast.cli import main
from holdfast.testing import MemoryCluster
from holdfast_core.model.audit.merkle import consistency_path, inclusion_path
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.server import ServiceHost
from holdfast_proto.v1 import audit_pb2, audit_pb2_grpc
from tests.model.audit_logs import CLUSTER_ID, Log, record, rotated, signer

Context = grpc.aio.ServicerContext[Any, Any]


class Audit(audit_pb2_grpc.AuditServiceServicer):
    """Answers from `log`, listing at most four records a call; an export breaks after `breaks_after` messages."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.breaks_after: int | None = None

    @property
    def keys(self) -> list[audit_pb2.AuditKey]:
        return [audit_pb2.AuditKey(key_id=key_id, public_key=key) for key_id, key in self.log.keys.items()]

    async def ListAuditRecords(
        self, request: audit_pb2.ListAuditRecordsRequest, context: Context
    ) -> audit_pb2.ListAuditRecordsResponse:
        found = [
            line
            for line, each in ((line, AuditRecord.from_line(line)) for line in self.log.lines)
            if each.sequence >= request.first
            and request.principal in ("", each.principal)
            and request.action in ("", each.action)
        ]
        if request.newest:
            return audit_pb2.ListAuditRecordsResponse(lines=found[::-1][: request.limit])
        part = found[: min(request.limit, 4)]
        after = AuditRecord.from_line(part[-1]).sequence + 1 if len(part) < len(found) else 0
        return audit_pb2.ListAuditRecordsResponse(lines=part, next=after)

    async def ExportAuditRecords(
        self, request: audit_pb2.ExportAuditRecordsRequest, context: Context
    ) -> AsyncIterator[audit_pb2.ExportAuditRecordsResponse]:
        start = sum(batch.head.size <= request.first for batch in self.log.batches)
        for number, message in enumerate(self.log.messages(start)):
            if number == self.breaks_after:
                raise HoldfastError(ErrorCode.UNREACHABLE, "too few nodes keep that part of the log")
            yield message

    async def GetAuditHead(
        self, request: audit_pb2.GetAuditHeadRequest, context: Context
    ) -> audit_pb2.GetAuditHeadResponse:
        return audit_pb2.GetAuditHeadResponse(cluster_id=CLUSTER_ID, head=self.log.batches[-1].head, keys=self.keys)

    async def ProveInclusion(
        self, request: audit_pb2.ProveInclusionRequest, context: Context
    ) -> audit_pb2.ProveInclusionResponse:
        path = inclusion_path(request.sequence, self.log.size, self.log.subtree())
        return audit_pb2.ProveInclusionResponse(
            cluster_id=CLUSTER_ID,
            line=self.log.lines[request.sequence],
            head=self.log.batches[-1].head,
            path=path,
        )

    async def ProveConsistency(
        self, request: audit_pb2.ProveConsistencyRequest, context: Context
    ) -> audit_pb2.ProveConsistencyResponse:
        old, new = request.from_size, request.to_size or self.log.size
        heads = {batch.head.size: batch.head for batch in self.log.batches}
        return audit_pb2.ProveConsistencyResponse(
            cluster_id=CLUSTER_ID,
            from_head=heads.get(old),
            to_head=heads[new],
            path=consistency_path(old, new, self.log.subtree()),
            from_size=old,
        )


@pytest.fixture
def audit() -> Audit:
    return Audit(rotated())


@pytest.fixture
def cluster(audit: Audit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A server with the audit service alone, as the coordinator that the commands know."""
    loop, stack = LoopThread(), AsyncExitStack()

    async def start() -> str:
        host = ServiceHost("test", bind="127.0.0.1:0")
        host.add(audit_pb2_grpc.add_AuditServiceServicer_to_server, audit, "holdfast.v1.AuditService")
        await host.start()
        stack.push_async_callback(host.stop, 0)
        return host.address

    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOLDFAST_COORDINATOR", loop.run(start()))
    yield
    loop.close(stack.aclose())


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command of `holdfast audit`; returns what it printed and, behind a line break, what it said."""

    def command(*words: object, code: int = 0) -> str:
        ended = main.run(["audit", *map(str, words)])
        printed = capsys.readouterr()
        assert ended == code, printed.err
        return printed.out if code == 0 else printed.err

    return command


@pytest.mark.usefixtures("cluster")
def test_records_are_listed(run: Run, audit: Audit) -> None:
    header, *rows = run("list").splitlines()
    assert header.split() == ["SEQ", "TIME", "PRINCIPAL", "TENANT", "ACTION", "RESOURCE", "OUTCOME"]
    assert [row.split()[0] for row in rows] == [str(place) for place in range(audit.log.size)]
    assert rows[4].split() == [
        "4", "2027-01-15", "08:00:00Z", "agent-1", "default", "snapshot.create", "vm/web-0", "OK",
    ]  # fmt: skip
    assert rows[3].split()[4] == "-"
    assert [row.split()[0] for row in run("list", "--first", 2, "--limit", 6).splitlines()[1:]] == list("234567")
    assert [row.split()[0] for row in run("list", "--newest", "--limit", 2).splitlines()[1:]] == ["10", "9"]
    assert len(run("list", "--principal", "agent-1").splitlines()) == 5
    [rotation, _] = json.loads(run("list", "--action", "keys.rotate-audit", "--json"))
    assert rotation["details"]["key_id"] == "audit-2"
    assert rotation["id"] == record(3).entry_id


@pytest.mark.usefixtures("cluster")
def test_what_a_record_names_does_not_steer_the_terminal(run: Run, audit: Audit) -> None:
    audit.log.append(principal="\x1b[2Jroot\n", resource="")
    assert run("list", "--first", 11).splitlines()[1].split()[3:] == [
        "?[2Jroot?", "default", "snapshot.create", "-", "OK",
    ]  # fmt: skip


@pytest.mark.usefixtures("cluster")
def test_an_export_is_verified(run: Run, audit: Audit, tmp_path: Path) -> None:
    file, first_key = tmp_path / "log.jsonl", audit.log.keys["audit-1"].hex()
    assert run("export", "-o", file) == f"11 records in {file}\n"
    assert file.read_bytes() == b"".join(line + b"\n" for line in audit.log.export())
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(run("export", "-o", file, "--json")) == {"records": 11, "file": str(file)}
    head = audit.log.batches[-1].head
    told = run("verify", file, "--key", first_key)
    assert told == f"11 records from 0 on, head 11 {head.root.hex()} of 2027-01-15 08:00:00Z is right\n"
    found = json.loads(run("verify", file, "--key", first_key, "--json"))
    assert (found["records"], found["size"], found["root"]) == (11, 11, head.root.hex())
    assert (found["key"], found["self_trusted"]) == (first_key, False)
    later = tmp_path / "later.jsonl"
    run("export", "--first", 5, "--output", later)
    assert later.read_bytes() == b"".join(line + b"\n" for line in audit.log.export(2))


@pytest.mark.usefixtures("cluster")
def test_an_export_goes_to_the_screen(capsys: pytest.CaptureFixture[str], audit: Audit) -> None:
    assert main.run(["audit", "export"]) == 0
    assert capsys.readouterr().out.encode().splitlines() == audit.log.export()


@pytest.mark.usefixtures("cluster")
def test_a_broken_export_leaves_the_older_file(run: Run, audit: Audit, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("older")
    audit.breaks_after = 3
    assert "too few nodes" in run("export", "-o", file, code=5)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["log.jsonl"]
    assert file.read_text() == "older"
    assert "cannot be written" in run("export", "-o", tmp_path / "no" / "log.jsonl", code=1)
    audit.log.batches.clear()
    assert "no record" in run("export", code=3)


@pytest.mark.usefixtures("cluster")
def test_a_head_that_was_kept_is_asked_for(run: Run, audit: Audit, tmp_path: Path) -> None:
    kept, file = tmp_path / "head.json", tmp_path / "log.jsonl"
    assert run("head", "-o", kept) == f"{kept}\n"
    assert json.loads(run("head")) == json.loads(kept.read_text())
    assert json.loads(kept.read_text())["type"] == "head"
    audit.log.append(2)
    run("export", "-o", file)
    for options in (("--head", kept), ("--key", kept), ("--head", kept, "--key", kept)):
        assert not json.loads(run("verify", file, "--json", *options))["self_trusted"]
    shorter = tmp_path / "shorter.jsonl"
    lines = file.read_bytes().splitlines()
    shorter.write_bytes(b"\n".join(lines[: -2 * 3]))
    assert "record 9 is missing: the export ends before the head at size 11" in run(
        "verify", shorter, "--head", kept, code=6
    )
    anew = Log(signer("audit-1", 3))
    anew.append(13)
    file.write_bytes(b"\n".join(anew.export()))
    assert "13 records" in run("verify", file)
    assert "forged" in run("verify", file, "--head", kept, code=6)


@pytest.mark.usefixtures("cluster")
def test_proofs_are_verified(run: Run, audit: Audit, tmp_path: Path) -> None:
    file, kept = tmp_path / "proof.json", tmp_path / "head.json"
    run("head", "-o", kept)
    assert run("prove", "--record", 4, "-o", file) == f"{file}\n"
    assert "record 4 is in the log (2027-01-15 08:00:00Z agent-1 default" in run("verify", file, "--key", kept)
    assert json.loads(run("verify", file, "--json"))["record"]["sequence"] == 4
    file.write_text(json.dumps(json.loads(file.read_text()), indent=2))
    assert "record 4 is in the log" in run("verify", file, "--head", kept)
    audit.log.append(2)
    proof = run("prove", "--from", 11)
    file.write_text(proof)
    assert "the log begins with the 11 records of the earlier one, head 13" in run("verify", file, "--head", kept)
    run("prove", "--from", 4, "--to", 8, "-o", file)
    assert json.loads(run("verify", file, "--json", "--key", kept))["size"] == 8
    file.write_text(proof.replace('"path":["', '"path":["00'))
    assert "this is no proof about an audit log" in run("verify", file, code=6)
    run("prove", "--from", 5, "-o", file)
    assert "holds no head at size 5" in run("verify", file, code=2)
    for words in ((), ("--record", 1, "--from", 2), ("--record", 1, "--to", 2), ("--to", 2)):
        assert "prove what?" in run("prove", *words, code=2)


def test_a_clusters_own_log(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, file, image = tmp_path / "head.json", tmp_path / "log.jsonl", tmp_path / "root.raw"
    image.write_bytes(b"content" * 10_000)
    with MemoryCluster(nodes=1, replicas=1) as memory, memory.state_manager() as manager:
        monkeypatch.setenv("HOLDFAST_COORDINATOR", memory.coordinator_address)
        monkeypatch.setenv("HOLDFAST_TOKEN", memory.token)
        run("head", "-o", kept)
        manager.register_vm("web", {"root": VolumeSpec(str(image))})
        point = manager.create_snapshot("web")
        run("export", "-o", file)
        [begun, done] = json.loads(run("list", "--action", "snapshot.create", "--json"))
        run("prove", "--record", done["sequence"], "-o", tmp_path / "record.json")
        run("prove", "--from", json.loads(kept.read_text())["size"], "-o", tmp_path / "growth.json")
    assert (begun["principal"], begun["resource"], begun["outcome"]) == ("admin", "vm/web", "OK")
    assert (begun["details"]["step"], done["details"]["step"], done["details"]["point"]) == ("begin", "commit", point)
    for proof in (file, tmp_path / "record.json", tmp_path / "growth.json"):
        assert "is right" in run("verify", proof, "--key", kept)
    assert "is right" in run("verify", file, "--head", kept)
    whole = file.read_bytes()
    for lost in (b'"principal":"admin"', b'"resource":"vm/web"', point.encode()):
        file.write_bytes(whole.replace(lost, lost.upper(), 1))
        assert "was altered" in run("verify", file, "--head", kept, code=6)


def test_an_export_that_was_changed_names_the_record(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, file, key = rotated().export(), tmp_path / "log.jsonl", tmp_path / "key"
    key.write_text(rotated().keys["audit-1"].hex() + "\n")
    for changed, says in (
        ([lines[0], *lines[2:]], "record 0 is missing"),
        ([lines[0], lines[2], lines[1], *lines[3:]], "record 0 is not in its place"),
        ([*lines[:2], b"{}", *lines[2:]], "a line was inserted at the place of record 1"),
        ([*lines[:2], lines[2].replace(b"agent-1", b"agent-2"), *lines[3:]], "record 1 was altered"),
        (lines[:-1], "from record 9 on nothing is signed"),
        ([*lines[:4], lines[4].replace(b'"size":3', b'"size":4'), *lines[5:]], "the head over record 0 is forged"),
    ):
        file.write_bytes(b"\n".join(changed))
        assert says in run("verify", file, "--key", key, code=6)
    file.write_bytes(b"\n".join(lines))
    assert main.run(["audit", "verify", str(file)]) == 0
    assert f"{rotated().keys['audit-1'].hex()} comes from {file} itself" in capsys.readouterr().err
    assert "not trusted" in run("verify", file, "--key", "00" * 32, code=6)
    for option in ("--key", "--head"):
        assert "this is no head" in run("verify", file, option, file, code=6)
        assert "cannot be read" in run("verify", file, option, tmp_path / "none", code=1)
    assert "cannot be read" in run("verify", tmp_path / "none", code=1)
    file.write_bytes(b"\0" * 2**21)
    assert "this is no export" in run("verify", file, code=6)
    assert "too long" in run("verify", file, "--key", file, code=6)
