"""NBD exports as volumes: by URI, with somebody else's dirty bitmap, and how consistent they count."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from holdfast import Consistency, ErrorCode, Extent, StateManager, VolumeSpec
from holdfast.results import Reading
from holdfast.sources import BackupRun, open_source
from holdfast.sources.nbd import NbdSource
from holdfast.sources.nbd_client import NbdEndpoint
from holdfast_core.model import nbd
from holdfast_core.model.limits import VOLUME_SIZE_BYTES_MAX
from tests.client.rig import error_of, make_sparse, noise
from tests.client.test_nbd_client import greet, request_of
from tests.support.nbd import make_qcow2, nbd_server, plain_bytes, qemu_io, qemu_nbd, scripted_server
from tests.support.qemu import tool

KIB = 1 << 10
MIB = 1 << 20
SIZE = 8 * MIB


def uri_of(endpoint: NbdEndpoint, export: str = "") -> str:
    """The URI of an export."""
    if endpoint.socket_path:
        return f"nbd+unix:///{quote(export)}?socket={quote(endpoint.socket_path)}"
    return f"nbd://{endpoint}/{quote(export)}"


def opened(uri: str, *, parent: str = "", live: bool = False) -> NbdSource:
    """The source of a session."""
    source = open_source(VolumeSpec(uri, live=live), BackupRun("vm", "new", parent))
    assert isinstance(source, NbdSource)
    return source


@pytest.mark.parametrize("tcp", [False, True])
def test_a_vm_on_an_export_is_backed_up(manager: StateManager, tmp_path: Path, tcp: bool) -> None:
    disk = make_sparse(tmp_path / "disk.raw", SIZE, [(MIB, noise(2 * MIB, 1)), (5 * MIB, noise(5000, 2))])
    with nbd_server(tmp_path, *qemu_nbd(disk, "--read-only", "--export-name=a disk"), tcp=tcp) as endpoint:
        manager.register_vm("exported", {"root": uri_of(endpoint, "a disk")}, replace=True)
        snapshot = manager.create_snapshot("exported")
        backup = manager.incremental_backup("exported", snapshot)
    first, second = manager.point(snapshot), manager.point(backup)
    assert first.stats.read_bytes < 3 * MIB
    assert first.volumes[0].consistency is Consistency.CRASH
    assert (second.volumes[0].reading, second.volumes[0].reading_note) == (Reading.COMPARED, "")
    assert second.volumes[0].root == first.volumes[0].root
    restored = manager.restore_vm(snapshot, "", target=tmp_path / "restored")
    assert (restored / "root.raw").read_bytes() == disk.read_bytes()
    error = error_of(lambda: manager.incremental_backup("exported", snapshot))
    assert error.code is ErrorCode.SOURCE_UNREADABLE


@contextmanager
def with_bitmap(image: Path, name: str, folder: Path) -> Iterator[str]:
    """Export an image with one of its bitmaps."""
    with nbd_server(folder, *qemu_nbd(image, "--read-only", f"--bitmap={name}", format="qcow2")) as endpoint:
        yield uri_of(endpoint)


def test_a_bitmap_named_after_the_parent_is_a_hint(manager: StateManager, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 4M")
    with nbd_server(tmp_path, *qemu_nbd(image, "--read-only", format="qcow2")) as endpoint:
        manager.register_vm("bitmapped", {"root": uri_of(endpoint)})
        snapshot = manager.create_snapshot("bitmapped")
    tool("qemu-img", "bitmap", "--add", image, f"holdfast-{snapshot}")
    qemu_io(image, "write -P 2 1M 64k", "write -P 3 5M 4k")
    with with_bitmap(image, f"holdfast-{snapshot}", tmp_path) as uri:
        manager.register_vm("bitmapped", {"root": uri}, replace=True)
        backup = manager.incremental_backup("bitmapped", snapshot)
        point = manager.point(backup)
        assert point.volumes[0].reading is Reading.CHANGED
        assert point.stats.read_bytes == 128 * KIB
        # The bitmap counts from the snapshot, and the newest point is another one now.
        again = manager.point(manager.incremental_backup("bitmapped", snapshot))
    assert again.volumes[0].reading is Reading.COMPARED
    assert f"and not holdfast-{backup}" in again.volumes[0].reading_note
    restored = manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
    assert (restored / "root.raw").read_bytes() == plain_bytes(image, tmp_path)


def test_a_bitmap_of_another_name_is_never_used(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 4M")
    tool("qemu-img", "bitmap", "--add", image, "nightly")
    with with_bitmap(image, "nightly", tmp_path) as uri:
        source = opened(uri, parent="snap-a")
        assert source.changed_since("snap-a") is None
        assert source.changed_since("nightly") is None
        assert source.why_unknown() == "the export has the bitmap 'nightly' and not holdfast-snap-a"
        source.committed()
        source.abandoned()
        source.close()
        first = opened(uri)
        assert (first.changed_since(""), first.why_unknown()) == (None, "")
        first.close()


def test_how_consistent_an_export_counts(tmp_path: Path) -> None:
    disk = make_sparse(tmp_path / "disk.raw", SIZE)
    for options, live, consistency in (
        (("--read-only",), False, Consistency.CRASH),
        (("--read-only",), True, Consistency.FUZZY),
        ((), False, Consistency.FUZZY),
    ):
        with nbd_server(tmp_path, *qemu_nbd(disk, *options)) as endpoint:
            source = opened(uri_of(endpoint), live=live)
            assert source.finish() is consistency
            source.close()


def test_an_export_larger_than_any_volume(tmp_path: Path) -> None:
    with scripted_server(tmp_path, lambda connection: greet(connection, VOLUME_SIZE_BYTES_MAX + 1)) as endpoint:
        error = error_of(lambda: opened(uri_of(endpoint)))
    assert error.code is ErrorCode.LIMIT_EXCEEDED


def test_a_server_that_cuts_an_export_to_pieces_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many extents a server invents, what is kept of them is bounded, and nothing is left out."""
    monkeypatch.setattr("holdfast.sources.nbd._EXTENTS_MAX", 100)

    def talk(connection: socket.socket) -> None:
        greet(connection)
        while True:
            request = request_of(connection)
            pieces = [nbd.StatusExtent(1, at & nbd.Status.ZERO) for at in range(70)]
            for context, flags in ((0, 0), (1, nbd.CHUNK_DONE)):
                data = nbd.pack_block_status(context, pieces)
                header = nbd.ChunkHeader(flags, nbd.Chunk.BLOCK_STATUS, request.cookie, len(data))
                connection.sendall(nbd.pack_chunk_header(header) + data)

    with scripted_server(tmp_path, talk) as endpoint:
        source = opened(uri_of(endpoint), parent="snap-a")
        allocated = source.allocated(0, MIB)
        changed = source.changed_since("snap-a")
        source.close()
    assert allocated[:2] == [Extent(0, 2), Extent(4, 6)]
    assert (allocated[-1].end, len(allocated) <= 51) == (MIB, True)
    assert changed is not None
    assert changed[-1].end == MIB


@pytest.mark.parametrize(
    "uri", ["nbds://host/x", "nbd://", "nbd+unix:///x", "nbd://host:0/x", "nbd://host/x?socket=/s", "nbd://a@host/"]
)
def test_uris_that_are_refused(manager: StateManager, uri: str) -> None:
    assert error_of(lambda: manager.register_vm("refused", {"root": uri})).code is ErrorCode.INVALID_ARGUMENT


def test_nobody_listens(manager: StateManager, tmp_path: Path) -> None:
    manager.register_vm("silent", {"root": f"nbd+unix:///x?socket={tmp_path}/none"})
    error = error_of(lambda: manager.create_snapshot("silent"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "no NBD server answers" in error.message
    assert manager.points("silent") == []
