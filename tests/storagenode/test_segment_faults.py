"""Disks that are full or fail: refused early where possible, taken back where not, and never acknowledged."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import wait_until
from tests.storagenode.engines import FaultyDisk, Recorder, open_engine, segment_paths

ALL = 1 << 30
ROOT = Path(__file__).parents[2]


def code_of(error: pytest.ExceptionInfo[HoldfastError]) -> ErrorCode:
    return error.value.code


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_that_finds_no_space_is_taken_back(tmp_path: Path, error: int) -> None:
    disk = FaultyDisk()
    store = open_engine(tmp_path, disk=disk)
    kept, late = make_blocks(12), make_blocks(12, first=20)
    store.put(1, kept)
    size = sum(path.stat().st_size for path in segment_paths(tmp_path))
    disk.write_error = error
    with pytest.raises(HoldfastError) as refused:
        store.put(1, late)
    assert code_of(refused) is ErrorCode.DISK_FULL
    assert sum(path.stat().st_size for path in segment_paths(tmp_path)) == size, "nothing of it stays"
    assert store.get(1, [b.id for b in kept + late], bytes_max=ALL) == [*kept, *[Verdict.MISSING] * 12]
    disk.write_error = 0
    assert store.put(1, late) == [Verdict.OK] * 12, "space came back and so does the store"
    store.close()
    again = open_engine(tmp_path)
    assert again.get(1, [b.id for b in kept + late], bytes_max=ALL) == [*kept, *late]
    again.close()


def test_no_space_in_the_middle_of_a_new_segment_is_taken_back(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = open_engine(tmp_path, disk=disk)
    store.put(1, make_blocks(3))
    create = store._files.create

    def fails(segment: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store._files.create = fails  # type: ignore[method-assign]
    with pytest.raises(HoldfastError) as refused:
        store.put(1, make_blocks(60, first=100))
    assert code_of(refused) is ErrorCode.DISK_FULL
    store._files.create = create  # type: ignore[method-assign]
    late = make_blocks(60, first=200)
    assert store.put(1, late) == [Verdict.OK] * 60
    assert store.get(1, [b.id for b in make_blocks(3) + late], bytes_max=ALL) == [*make_blocks(3), *late]
    store.close()


def test_a_failed_sync_is_never_acknowledged_and_ends_all_writing(tmp_path: Path) -> None:
    disk, recorder = FaultyDisk(), Recorder()
    store = open_engine(tmp_path, disk=disk, observer=recorder)
    kept, lost = make_blocks(3), make_blocks(3, first=10)
    store.put(1, kept)
    disk.sync_error = errno.EIO
    with pytest.raises(HoldfastError) as refused:
        store.put(1, lost)
    assert code_of(refused) is ErrorCode.INTERNAL
    disk.sync_error = 0
    with pytest.raises(HoldfastError) as refused:
        store.put(1, make_blocks(1, first=20))
    assert code_of(refused) is ErrorCode.INTERNAL, "a sync that works again proves nothing"
    with pytest.raises(HoldfastError):
        store.delete(1, [kept[0].id])
    assert store.status().failed
    assert len(recorder.failures) == 1
    assert store.get(1, [b.id for b in kept + lost], bytes_max=ALL) == [*kept, *[Verdict.MISSING] * 3]
    store.close()
    again = open_engine(tmp_path)
    assert again.get(1, [b.id for b in kept + lost], bytes_max=ALL) == [*kept, *[Verdict.MISSING] * 3]
    assert again.put(1, lost) == [Verdict.OK] * 3
    again.close()


def test_a_write_that_cannot_be_taken_back_ends_all_writing(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = open_engine(tmp_path, disk=disk)
    store.put(1, make_blocks(3))
    disk.write_error, disk.truncate_error = errno.ENOSPC, 1
    with pytest.raises(HoldfastError) as refused:
        store.put(1, make_blocks(3, first=10))
    assert code_of(refused) is ErrorCode.INTERNAL
    disk.write_error = disk.truncate_error = 0
    assert store.status().failed
    store.close()
    again = open_engine(tmp_path)
    assert again.status().block_count >= 3
    assert again.get(1, [b.id for b in make_blocks(3)], bytes_max=ALL) == make_blocks(3)
    again.close()


def test_batches_that_wait_share_one_sync_and_none_is_answered_before_it(tmp_path: Path) -> None:
    disk, recorder = FaultyDisk(), Recorder()
    store = open_engine(tmp_path, disk=disk, observer=recorder)
    disk.release.clear()
    syncs = disk.syncs
    first = store.submit(1, make_blocks(1))
    wait_until(lambda: not store._committer._queue)
    waiting = [store.submit(1, make_blocks(2, first=10 * at)) for at in range(1, 6)]
    again = store.submit(1, make_blocks(2, first=10))
    assert not any(future.done() for future in (first, *waiting, again))
    assert store.has(1, [make_block(10).id]) == [Verdict.MISSING], "not durable, so not there"
    assert store.put(1, []) == []
    disk.release.set()
    assert first.result() == [Verdict.OK]
    assert [future.result() for future in waiting] == [[Verdict.OK] * 2] * 5
    assert again.result() == [Verdict.PRESENT] * 2
    assert disk.syncs - syncs == 2
    assert recorder.commits == [1, 6]
    store.close()


def test_who_builds_on_a_write_that_fails_fails_with_it(tmp_path: Path) -> None:
    disk = FaultyDisk()
    store = open_engine(tmp_path, disk=disk)
    disk.release.clear()
    first = store.submit(1, make_blocks(1))
    wait_until(lambda: not store._committer._queue)
    disk.write_error = errno.ENOSPC
    failing = store.submit(1, make_blocks(1, first=5))
    building = store.submit(1, make_blocks(1, first=5))
    disk.release.set()
    assert first.result() == [Verdict.OK]
    for future in (failing, building):
        with pytest.raises(HoldfastError) as refused:
            future.result()
        assert code_of(refused) is ErrorCode.DISK_FULL
    store.close()


def test_the_reserve_of_the_disk_stays_free(tmp_path: Path) -> None:
    class AlmostFull(FaultyDisk):
        def free_bytes(self, directory: Path) -> int:
            return 100_000

    disk = AlmostFull()
    store = open_engine(tmp_path, disk=disk, options=EngineOptions(reserve_bytes=90_000, segment_bytes=1 << 20))
    assert store.put(1, make_blocks(3)) == [Verdict.OK] * 3
    with pytest.raises(HoldfastError) as refused:
        store.put(1, make_blocks(20, first=10))
    assert code_of(refused) is ErrorCode.DISK_FULL
    assert store.status().full
    assert store.delete(1, [make_block(0).id]) == [Verdict.OK], "deleting is how space comes back"
    store.close()


def test_a_real_limit_of_the_kernel_is_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel itself refuse a write half way (EFBIG), in a process of its own."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from holdfast_core.model.errors import ErrorCode, HoldfastError\n"
        "from tests.storagenode.blocks import make_blocks\n"
        "from tests.storagenode.engines import open_engine\n"
        "from holdfast_storagenode.segments.engine import EngineOptions\n"
        "store = open_engine(Path(sys.argv[1]), options=EngineOptions(reserve_bytes=0))\n"
        "store.put(1, make_blocks(5))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    store.put(1, make_blocks(50, first=100))\n"
        "    sys.exit('it was acknowledged')\n"
        "except HoldfastError as error:\n"
        "    assert error.code is ErrorCode.DISK_FULL, error\n"
        "assert store.put(1, make_blocks(2, first=200)) == [1, 1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "store.close()\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, timeout=60)
    store = open_engine(tmp_path)
    blocks = make_blocks(5) + make_blocks(2, first=200)
    assert store.get(1, [block.id for block in blocks], bytes_max=ALL) == blocks
    assert store.status().block_count == 7
    store.close()


def test_a_full_index_disk_loses_nothing(tmp_path: Path) -> None:
    """The index is written again later; until then the log is replayed from further back."""
    store = open_engine(tmp_path)
    blocks = make_blocks(30)
    store.put(1, blocks)
    write, attempts = store._index.write, []

    def full(changes: object, checkpoint: object) -> None:
        import lmdb

        attempts.append(checkpoint)
        raise lmdb.DiskError("No space left on device")

    store._index.write = full  # type: ignore[method-assign]
    assert not store.checkpoint()
    assert attempts
    assert store.get(1, [b.id for b in blocks], bytes_max=ALL) == blocks
    store.put(1, make_blocks(3, first=90))
    crashed = tmp_path / "crashed"
    shutil.copytree(tmp_path, crashed, ignore=shutil.ignore_patterns("crashed"))
    store._index.write = write  # type: ignore[method-assign]
    assert store.checkpoint()
    store.close()
    for directory in (tmp_path, crashed):
        again = open_engine(directory)
        assert again.status().block_count == 33
        again.close()
