"""Overlays: they belong to one point, survive their server, are filled by a hydrate and saved as backups."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError, StateManager
from holdfast.serving.overlay import Overlay
from holdfast.testing import MemoryCluster
from holdfast_core.model.nbd import Command, CommandFlag, Errno
from tests.client.rig import BLOCK, Vm, data_ids, error_of, noise, rot
from tests.e2e.harness import eventually
from tests.serving.conftest import ROOT_BYTES, ServedVm
from tests.serving.rig import Client


def test_what_was_written_is_there_again(manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "deep" / "overlay"
    model = bytearray(served.content())
    rng = random.Random(4)
    for _ in range(3):
        with manager.serve_point(served.point, socket=socket, overlay=overlay), Client(socket) as client:
            assert client.read(0, ROOT_BYTES) == model
            for _ in range(20):
                at = rng.randrange(ROOT_BYTES - 9000)
                data = rng.randbytes(rng.choice([10, 4096, 9000]))
                client.write(at, data)
                model[at : at + len(data)] = data
    with Overlay(overlay, None) as opened:
        assert opened.manifest.point_id == served.point
        assert opened.written_bytes()["data"] == 0
        assert 20 * 10 < opened.written_bytes()["root"] <= ROOT_BYTES


def test_the_map_follows_the_data_to_the_disk(
    manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path
) -> None:
    written = tmp_path / "overlay" / "root.written.map"

    def kept() -> int:
        return int.from_bytes(written.read_bytes(), "little")

    with manager.serve_point(served.point, socket=socket, overlay=tmp_path / "overlay"), Client(socket) as client:
        client.write(4096, bytes([7]) * 8192)
        client.write(5 * 4096, b"x")
        assert kept() == 0, "a write alone counts for nothing after a crash"
        client.flush()
        assert kept() == 0b100110
        client.write(0, b"y", flags=CommandFlag.FUA)
        assert kept() == 0b100111
        client.write(7 * 4096, b"z")
    assert kept() == 0b10100111, "a server that ends in good order flushes"


def test_an_overlay_fits_its_own_point_alone(
    manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    manager.serve_point(served.point, socket=socket, overlay=overlay).close()
    later = manager.incremental_backup(served.vm.name, served.point)
    error = error_of(lambda: manager.serve_point(later, socket=socket, overlay=overlay))
    assert error.code is ErrorCode.MISMATCH
    assert served.point in error.message


def test_an_overlay_has_one_user(manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    with manager.serve_point(served.point, socket=socket, overlay=overlay):
        other = socket.with_name("other")
        assert error_of(lambda: manager.serve_point(served.point, socket=other, overlay=overlay)).code is ErrorCode.BUSY
        assert error_of(lambda: manager.save_overlay(overlay)).code is ErrorCode.BUSY
    manager.serve_point(served.point, socket=socket, overlay=overlay).close()


def test_a_folder_of_other_things_becomes_no_overlay(
    manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    error = error_of(lambda: manager.serve_point(served.point, socket=socket, overlay=tmp_path / "photos"))
    assert error.code is ErrorCode.TARGET_EXISTS
    assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "file").write_bytes(b"")
    error = error_of(lambda: manager.serve_point(served.point, socket=socket, overlay=tmp_path / "file"))
    assert error.code is ErrorCode.TARGET_UNWRITABLE
    assert error_of(lambda: manager.save_overlay(tmp_path / "nothing")).code is ErrorCode.NOT_FOUND
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": 2}', '{"format": 1, "vm_id": "v", "point_id": "../x", "volumes": []}', "\xff"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "overlay.json").write_text(text, encoding="latin-1")
    assert error_of(lambda: Overlay(tmp_path, None)).code is ErrorCode.CORRUPT


def test_a_file_of_another_size_is_refused(
    manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path
) -> None:
    manager.serve_point(served.point, socket=socket, overlay=tmp_path / "overlay").close()
    with (tmp_path / "overlay" / "root.written").open("r+b") as stream:
        stream.truncate(4096)
    error = error_of(lambda: manager.serve_point(served.point, socket=socket, overlay=tmp_path / "overlay"))
    assert error.code is ErrorCode.MISMATCH


def test_a_hydrate_needs_a_place(manager: StateManager, served: ServedVm, socket: Path) -> None:
    error = error_of(lambda: manager.serve_point(served.point, socket=socket, hydrate=True))
    assert error.code is ErrorCode.INVALID_ARGUMENT


def test_after_a_hydrate_the_cluster_is_not_needed(cluster: MemoryCluster, socket: Path, tmp_path: Path) -> None:
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(64 * BLOCK + 5, [(0, noise(20 * BLOCK, 1)), (40 * BLOCK, noise(24 * BLOCK + 5, 2))])
        vm.volume(BLOCK, [(0, b"data")], name="data")
        vm.register("root", "data")
        point = vm.snapshot()
        told: list[str] = []
        with (
            manager.serve_point(
                point, socket=socket, overlay=tmp_path / "overlay", hydrate=True, hydrated=told.append
            ) as serving,
            Client(socket) as client,
        ):
            client.write(3 * BLOCK + 5, b"written meanwhile")
            serving.wait_hydrated()
            assert sorted(told) == ["data", "root"]
            for number in range(3):
                cluster.stop_node(number)
            expected = bytearray(vm.path().read_bytes())
            expected[3 * BLOCK + 5 : 3 * BLOCK + 5 + 17] = b"written meanwhile"
            assert client.read(0, len(expected)) == expected
            extents = client.status(0, len(expected))
            assert [(extent.length // BLOCK, extent.flags) for extent in extents] == [(20, 0), (20, 3), (24, 0)]
        with Overlay(tmp_path / "overlay", None) as overlay:
            assert overlay.fetched_bytes() == {"root": 64 * BLOCK + 5, "data": BLOCK}


def test_a_hydrate_goes_on_where_it_was(cluster: MemoryCluster, socket: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(64 * BLOCK, [(0, noise(64 * BLOCK, 1))])
        vm.register()
        point = vm.snapshot()
        options = {"socket": socket, "overlay": overlay, "hydrate": True}
        with manager.serve_point(point, **options) as serving:  # type: ignore[arg-type]
            serving.wait_hydrated()
        for number in range(3):
            for block_id in data_ids(cluster, number):
                rot(cluster, number, block_id)
        with manager.serve_point(point, **options) as serving, Client(socket) as client:  # type: ignore[arg-type]
            serving.wait_hydrated()
            assert client.read(0, 64 * BLOCK) == vm.path().read_bytes()


def test_lost_blocks_stop_no_hydrate_and_fail_their_reads_alone(
    cluster: MemoryCluster, socket: Path, tmp_path: Path
) -> None:
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(16 * BLOCK, [(0, noise(16 * BLOCK, 1))])
        vm.register()
        point = vm.snapshot()
        lost = data_ids(cluster, 0)[0]
        for number in range(3):
            rot(cluster, number, lost)
        content = vm.path().read_bytes()
        with manager.serve_point(point, socket=socket, overlay=tmp_path / "overlay", hydrate=True) as serving:
            with pytest.raises(HoldfastError) as caught:
                serving.wait_hydrated()
            assert (caught.value.code, caught.value.block_ids) == (ErrorCode.CORRUPT, (lost,))
            with Client(socket) as client:
                failed = 0
                for at in range(0, 16 * BLOCK, BLOCK):
                    client.request(Command.READ, at, BLOCK)
                    error, data = client.answer()
                    failed += error == Errno.IO
                    assert error == Errno.IO or data[8:] == content[at : at + BLOCK]
                assert failed == 1


def test_a_cluster_that_is_away_for_a_moment_is_waited_for(
    cluster: MemoryCluster, socket: Path, tmp_path: Path
) -> None:
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(16 * BLOCK, [(0, noise(16 * BLOCK, 1))])
        vm.register()
        with manager.serve_point(vm.snapshot(), socket=socket), Client(socket) as client:
            for number in range(3):
                cluster.stop_node(number)
            client.request(Command.READ, 0, BLOCK)
            for number in range(3):
                cluster.start_node(number, wait=False)
            error, data = client.answer()
            assert (error, data[8:]) == (0, vm.path().read_bytes()[:BLOCK])


def test_an_overlay_is_saved_as_a_backup(manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    model = bytearray(served.content())
    with manager.serve_point(served.point, socket=socket, overlay=overlay), Client(socket) as client:
        for at, data in ((5 * BLOCK + 77, b"new" * 50), (ROOT_BYTES - 5, b"end!!"), (16 * BLOCK, bytes(BLOCK))):
            client.write(at, data)
            model[at : at + len(data)] = data
        assert client.ask(Command.TRIM, 0, 2 * BLOCK) == 0
        model[: 2 * BLOCK] = bytes(2 * BLOCK)
    # What the VM's registered volumes hold by now is no part of it.
    served.vm.path().write_bytes(bytes(ROOT_BYTES))
    backup = manager.save_overlay(overlay)
    saved = manager.point(backup)
    assert (saved.parent_id, saved.vm_id) == (served.point, served.vm.name)
    target = served.vm.restored(served.point, backup)
    assert (target / "root.raw").read_bytes() == model
    assert (target / "data.raw").read_bytes() == served.content("data")
    transfer = manager.last_transfer
    assert transfer is not None
    assert transfer.stats.changed_bytes < 6 * BLOCK
    with manager.serve_point(served.point, socket=socket, overlay=overlay), Client(socket) as client:
        assert client.read(0, ROOT_BYTES) == model
    with manager.serve_point(backup, socket=socket), Client(socket) as client:
        assert client.read(0, ROOT_BYTES) == model


def test_a_discarded_overlay_is_gone(manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    with manager.serve_point(served.point, socket=socket, overlay=overlay):
        assert error_of(lambda: Overlay(overlay, None)).code is ErrorCode.BUSY
    with Overlay(overlay, None) as opened:
        opened.discard()
    assert not overlay.exists()


def test_closing_the_manager_ends_its_servers(shared_cluster: MemoryCluster, served: ServedVm, socket: Path) -> None:
    manager = StateManager(shared_cluster.coordinator_address, token=shared_cluster.token)
    point = manager.serve_point(served.point, socket=socket)
    with Client(socket) as client:
        assert client.read(0, 10) == served.content()[:10]
        manager.close()
        assert client.ended()
    eventually(lambda: not socket.exists(), "the end of the socket")
    point.close()
