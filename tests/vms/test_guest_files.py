"""Files out of the disk of a guest at work: what the kernel wrote, its journal not yet brought to its place."""

from __future__ import annotations

import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from holdfast import PointFiles
from holdfast.files.image_tree import ImageTree
from holdfast.testing import MemoryCluster
from tests.client.files.images import ImageFile
from tests.client.files.trees import likenesses, retrieve
from tests.support.guest import Drive, Guest, make_root

pytestmark = pytest.mark.slow

WORK = (
    "mkdir -p /data/deep/er /data/many && cd /data && "
    "dd if=/dev/urandom of=weights bs=64k count=40 2>/dev/null && "
    "ln weights deep/again && ln -s ../weights deep/link && "
    "i=0; while [ $i -lt 1500 ]; do echo $i >many/a-long-name-fills-directories-soon-$i; i=$((i+1)); done; "
    "rm many/*7; dd if=/dev/zero of=sparse bs=1 count=1 seek=9000000 2>/dev/null; "
    "mknod null c 1 3; mkfifo pipe; chown 12:34 weights; chmod 4711 pipe; touch -d '2021-02-03 04:05:06' many; "
    "find . -type f | sort | xargs sha256sum >/sums; sync; "
    # Durable by the journal alone: fsync commits, and brings nothing to its place.
    "mv deep/er deep/renamed; echo late | dd of=late conv=fsync 2>/dev/null"
)


def test_what_a_guest_wrote_is_read_while_it_runs(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root.img", size_bytes=128 << 20)
    with MemoryCluster() as cluster, cluster.state_manager() as manager:
        with Guest([Drive.raw("root", root)]) as guest:
            guest.wait_for_login()
            guest.run(WORK)
            manager.register_vm("guest", {"root": guest.uri("root")})
            snapshot = manager.create_snapshot("guest")
            guest.kill()
        storage_id = manager.persist_files("task", PointFiles(snapshot, root="/data"))
        manager.retrieve_files(storage_id, tmp_path / "kept")
        sums = manager.read_file(snapshot, "sums").decode()
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet"],
        input=sums,
        cwd=tmp_path / "kept",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = likenesses(tmp_path / "kept")
    assert len([path for path in found if path.startswith(b"many/")]) == 1350
    assert found[b"weights"].owner == (12, 34)
    assert found[b"weights"].first_name == found[b"deep/again"].first_name
    assert found[b"deep/link"].target == b"../weights"
    assert found[b"many"].mtime_ns // 10**9 == 1_612_325_106
    assert b"deep/renamed" in found
    assert b"deep/er" not in found


def test_a_guest_that_was_cut_off_has_what_mounting_would_show(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root.img", size_bytes=128 << 20)
    with Guest([Drive.raw("root", root)]) as guest:
        guest.wait_for_login()
        guest.run(WORK)
        guest.kill()
    with closing(ImageTree(ImageFile(root), root="/data")) as tree:
        assert tree._files._newer, "the journal has something to apply"
        retrieve(tree, tmp_path / "read")
    with Guest([Drive.raw("root", root)]) as guest:
        guest.wait_for_login()
        # The kernel applies the journal when it mounts; then it is unmounted.
        guest.run("sync")
        guest.shut_down()
    with closing(ImageTree(ImageFile(root), root="/data")) as tree:
        retrieve(tree, tmp_path / "mounted")
    assert likenesses(tmp_path / "read") == likenesses(tmp_path / "mounted")
