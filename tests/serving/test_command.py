"""`holdfast serve` and `holdfast overlay` as processes: what they print, how they end, and kill -9 in the middle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import psutil
import pytest

from holdfast.cli import main
from holdfast.testing import MemoryCluster
from holdfast_core.model.nbd import Command, Errno
from tests.client.rig import BLOCK
from tests.e2e.harness import run
from tests.serving.conftest import ROOT_BYTES, ServedVm
from tests.serving.rig import Client, Serve

pytestmark = pytest.mark.slow


def serve(cluster: MemoryCluster, folder: Path, *arguments: str) -> Serve:
    """A command that serves two volumes of the cluster, not yet started."""
    return Serve(cluster.coordinator_address, cluster.token, arguments, folder, lines=1 if "--json" in arguments else 2)


def test_it_says_where_each_volume_is_and_ends_in_good_order(
    shared_cluster: MemoryCluster, served: ServedVm, tmp_path: Path
) -> None:
    with serve(shared_cluster, tmp_path, served.point, "--listen", "127.0.0.1:0") as command:
        assert [uri.rpartition("/")[2] for uri in command.uris] == ["data", "root"]
        assert all(uri.startswith("nbd://127.0.0.1:") for uri in command.uris)
        assert command.stop() == []
    with serve(shared_cluster, tmp_path, served.point, "--listen", "127.0.0.1:0", "--json") as command:
        told = json.loads(command.stdout[0])
        assert told["point_id"] == served.point
        assert list(told["uris"]) == ["data", "root"]


def test_acknowledged_flushes_survive_kill_9(
    shared_cluster: MemoryCluster, served: ServedVm, socket: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    arguments = (served.point, "--socket", str(socket), "--overlay", str(overlay), "--hydrate")
    rng = random.Random(1)
    flushed = bytearray(served.content())
    for _ in range(3):
        with serve(shared_cluster, tmp_path, *arguments) as command, Client(socket) as client:
            found = client.read(0, ROOT_BYTES)
            assert len(found) == ROOT_BYTES
            assert [at for at in range(0, ROOT_BYTES, 4096) if found[at : at + 4096] != flushed[at : at + 4096]] == []
            for _ in range(rng.randrange(1, 40)):
                at = rng.randrange(ROOT_BYTES - 6000)
                data = rng.randbytes(rng.choice([100, 4096, 6000]))
                client.write(at, data)
                flushed[at : at + len(data)] = data
            client.flush()
            # What comes after the flush may be lost, so it repeats what is there.
            for _ in range(20):
                at = rng.randrange(ROOT_BYTES - 4096)
                client.request(Command.WRITE, at, 4096, payload=bytes(flushed[at : at + 4096]))
            command.kill()
    told = run("overlay", "show", str(overlay), "--json")
    assert told.returncode == 0, told.stderr
    shown = json.loads(told.stdout)
    assert shown["point_id"] == served.point
    assert {volume["name"]: volume["size_bytes"] for volume in shown["volumes"]}["root"] == ROOT_BYTES
    saved = run("overlay", "save", str(overlay), *connection(shared_cluster, tmp_path))
    assert saved.returncode == 0, saved.stderr
    backup = saved.stdout.decode().strip()
    assert (served.vm.restored(served.point, backup) / "root.raw").read_bytes() == flushed
    assert run("overlay", "discard", str(overlay)).returncode == 0
    assert not overlay.exists()


def test_a_full_disk_is_told_to_the_guest_and_costs_nothing_else(
    shared_cluster: MemoryCluster, served: ServedVm, socket: Path, tmp_path: Path
) -> None:
    arguments = (served.point, "--socket", str(socket), "--overlay", str(tmp_path / "overlay"))
    content = served.content()
    with serve(shared_cluster, tmp_path, *arguments) as command, Client(socket) as client:
        assert command.process is not None
        process = psutil.Process(command.process.pid)
        # To the process, a file that may not grow is a disk that is full.
        process.rlimit(psutil.RLIMIT_FSIZE, (10 * BLOCK, psutil.RLIM_INFINITY))
        client.write(BLOCK, b"before")
        assert client.ask(Command.WRITE, 12 * BLOCK, 4096, payload=b"x" * 4096) == Errno.NOSPC
        client.flush()
        assert client.read(0, ROOT_BYTES) == content[:BLOCK] + b"before" + content[BLOCK + 6 :]
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        client.write(12 * BLOCK, b"x" * 4096)
        assert client.read(12 * BLOCK, 4096) == b"x" * 4096


def connection(cluster: MemoryCluster, folder: Path) -> tuple[str, ...]:
    """Options that name the cluster; the token's file is there since `Serve` has run."""
    return ("--coordinator", cluster.coordinator_address, "--token-file", str(folder / "serve.token"))


def test_contradictions_are_told(
    shared_cluster: MemoryCluster, served: ServedVm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token_file = tmp_path / "serve.token"
    token_file.touch(mode=0o600)
    token_file.write_text(shared_cluster.token)
    at_cluster = connection(shared_cluster, tmp_path)
    for words, reason in (
        (("--save",), "overlay"),
        (("--hydrate",), "overlay"),
        (("--save", "--overlay", str(tmp_path / "o"), "--read-only"), "write"),
        (("--listen", "127.0.0.1:0", "--socket", str(tmp_path / "s")), "not both"),
        (("--cache", "much"), "size"),
        (("--socket", str(tmp_path / ("s" * 120))), "longer"),
    ):
        assert main.run(["serve", served.point, *words, *at_cluster]) == 2, words
        assert reason in capsys.readouterr().err, words
    assert main.run(["serve", "snap-unknown", "--listen", "127.0.0.1:0", *at_cluster]) == 3
    assert main.run(["overlay", "show", str(tmp_path / "nothing")]) == 3
