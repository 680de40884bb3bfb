"""Another master key for a cluster of real processes: what a wrong one is told, and that no block is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Up, run
from tests.e2e.images import MIB, digest, make_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    """A cluster of one's own."""
    cluster = Up(tmp_path / "data", ["--nodes", "1"])
    yield cluster
    if cluster.process is not None and cluster.process.poll() is None:
        cluster.kill()


def blocks_of(up: Up) -> dict[str, str]:
    """Digests of all segment files."""
    folder = up.data / "node-1"
    files = [path for path in folder.rglob("*") if path.is_file() and "segments" in path.parts]
    assert files
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_master_key_changes_and_the_old_one_is_refused(up: Up, tmp_path: Path) -> None:
    up.start()
    disk = tmp_path / "vm.raw"
    make_image(disk, size_bytes=8 * MIB, data_bytes=MIB, seed=5)
    up.ok("vm", "register", "vm", "--volume", f"root={disk}")
    snapshot = up.ok("snapshot", "vm")
    assert up.stop() == 0

    key, old, new = up.data / "master.key", tmp_path / "old.key", tmp_path / "new.key"
    old.write_bytes(key.read_bytes())
    made = run("keys", "make", str(new))
    assert made.returncode == 0
    fingerprint = made.stdout.decode().strip()
    before = blocks_of(up)

    # The new one alone opens nothing yet.
    key.write_bytes(new.read_bytes())
    with pytest.raises(AssertionError, match=rf"exit code 7.*the one given has {fingerprint}"):
        up.start()

    up.arguments = ["--nodes", "1", "--old-master-key", str(old)]
    up.start()
    assert up.ok("keys", "rewrap") == f"4 secrets rewrapped by master key {fingerprint}"
    assert f"wrapped by {fingerprint}" in up.ok("keys", "list")
    assert up.stop() == 0

    up.arguments = ["--nodes", "1"]
    up.start()
    up.ok("restore", snapshot, "--to", str(tmp_path / "restored"))
    assert digest(tmp_path / "restored" / "root.raw") == digest(disk)
    assert up.stop() == 0
    assert blocks_of(up) == before

    key.write_bytes(old.read_bytes())
    with pytest.raises(AssertionError, match=rf"exit code 7.*wrapped by the master key with fingerprint {fingerprint}"):
        up.start()
