"""A writer that goes on whatever happens, and remembers what was acknowledged to it."""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from holdfast import ErrorCode, HoldfastError, StateManager
from tests.e2e.harness import eventually
from tests.e2e.images import KIB, MIB, change_image, digest, make_image

# What a fault may make of a call. Everything else is a bug, or data that was lost.
_EXCUSED = frozenset(
    {
        ErrorCode.BUSY,
        ErrorCode.CONFLICT,
        ErrorCode.WRONG_EPOCH,
        ErrorCode.UNREACHABLE,
        ErrorCode.NO_QUORUM,
        ErrorCode.NOT_READY,
        ErrorCode.NOT_DURABLE,
        ErrorCode.SESSION_LAPSED,
    }
)
_OBJECT_BYTES_MAX = 192 * KIB
# So long after a test has waited for writes there is no pause between them: that is when its fault strikes.
_HURRY_S = 3.0
# Else a test that waits for a lease to end would have hundreds of points to compare after it.
_PAUSE_S = 0.2


@dataclass(slots=True)
class Book:
    """What was acknowledged, by id, with the SHA-256 of its bytes.

    Attributes:
        points: recovery points, oldest first.
        objects: application data.
        forgotten: what the writer asked to forget, acknowledged or not: nothing is said of it any more.
        refusals: what calls failed with.
    """

    points: dict[str, str] = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    refusals: list[HoldfastError] = field(default_factory=list)

    @property
    def writes(self) -> int:
        """How many writes were acknowledged."""
        return len(self.points) + len(self.objects) + len(self.forgotten)


class Load:
    """One VM and one task, written by a thread of its own from a seed. A context manager: it writes while open.

    Replays with the same seed make the same content in the same order; at which of it a fault strikes depends on the
    machine.
    """

    def __init__(
        self,
        make_manager: Callable[[], StateManager],
        folder: Path,
        *,
        seed: int,
        forgets: bool = False,
        excused: frozenset[ErrorCode] = frozenset(),
    ) -> None:
        """Prepare; `forgets` says whether older points and objects are forgotten on the way.

        What a fault may make of a call beyond what any may is `excused`.
        """
        self.book = Book()
        self.vm_id = f"vm-{seed}"
        self.task_id = f"task-{seed}"
        self._make_manager = make_manager
        self._folder = folder / f"load-{seed}"
        self._source = random.Random(seed)
        self._forgets = forgets
        self._excused = _EXCUSED | excused
        self._ending = threading.Event()
        self._hurry_until_s = 0.0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"load-{seed}", daemon=True)

    def __enter__(self) -> Load:
        """Begin to write; returns after the first point."""
        self._folder.mkdir()
        make_image(self._disk, size_bytes=3 * MIB, data_bytes=MIB, seed=self._source.randrange(1 << 30))
        self._thread.start()
        self.await_writes(1)
        return self

    def __exit__(self, *_: object) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """End, and raise what the writer met that no fault excuses."""
        self._ending.set()
        self._thread.join(timeout=200)
        assert not self._thread.is_alive(), "the writer ends"
        if self._failure is not None:
            raise self._failure

    @property
    def restores(self) -> Path:
        """A directory for what is restored."""
        return self._folder / "restored"

    def await_writes(self, count: int, *, within_s: float = 120.0) -> None:
        """Wait until so many more writes were acknowledged."""
        goal = self.book.writes + count

        def wrote() -> bool:
            if self._failure is not None:
                raise self._failure
            self._hurry_until_s = time.monotonic() + _HURRY_S
            return self.book.writes >= goal

        eventually(wrote, f"{count} more writes; the last refusals are {self.book.refusals[-3:]}", within_s=within_s)

    @property
    def _disk(self) -> Path:
        return self._folder / "disk.raw"

    def _run(self) -> None:
        try:
            with self._make_manager() as manager:
                self._until_done(lambda: manager.register_vm(self.vm_id, volumes={"root": str(self._disk)}))
                while not self._ending.is_set():
                    try:
                        self._write(manager)
                    except HoldfastError as error:
                        if error.code not in self._excused:
                            raise
                        self.book.refusals.append(error)
                        self._ending.wait(0.1)
                    if time.monotonic() > self._hurry_until_s:
                        self._ending.wait(_PAUSE_S)
        except (HoldfastError, OSError, AssertionError) as error:
            self._failure = error

    def _until_done(self, call: Callable[[], object]) -> None:
        while not self._ending.is_set():
            try:
                call()
            except HoldfastError as error:
                if error.code not in self._excused:
                    raise
                self.book.refusals.append(error)
                self._ending.wait(0.1)
            else:
                return

    def _write(self, manager: StateManager) -> None:
        book, chance = self.book, self._source.random()
        if not book.points:
            book.points[manager.create_snapshot(self.vm_id, takeover=True)] = digest(self._disk)
        elif chance < 0.5:
            change_image(self._disk, edits=self._source.randrange(1, 8), seed=self._source.randrange(1 << 30))
            newest = next(reversed(book.points))
            book.points[manager.incremental_backup(self.vm_id, newest, takeover=True)] = digest(self._disk)
        elif chance < 0.75 or not self._forgets:
            data = self._source.randbytes(self._source.randrange(1, _OBJECT_BYTES_MAX))
            stored = manager.persist_application_data(self.task_id, data)
            book.objects[stored] = hashlib.sha256(data).hexdigest()
        else:
            self._forget(manager)

    def _forget(self, manager: StateManager) -> None:
        """Forget an older point and an object; what is asked to be forgotten is not expected back, whatever comes."""
        book = self.book
        if len(book.points) > 2:
            point_id = self._source.choice(list(book.points)[:-1])
            del book.points[point_id]
            book.forgotten.add(point_id)
            manager.forget(point_id)
        if book.objects:
            storage_id = self._source.choice(list(book.objects))
            del book.objects[storage_id]
            book.forgotten.add(storage_id)
            manager.forget_application_data(storage_id)


def let_go(manager: StateManager, load: Load) -> None:
    """Forget everything, so that the next test has less to check."""
    for point in manager.points(load.vm_id):
        if point.lock is not None:
            manager.unlock(point.point_id)
        manager.forget(point.point_id)
    for stored in manager.list_application_data(load.task_id):
        manager.forget_application_data(stored.storage_id)


def assert_kept(manager: StateManager, load: Load) -> None:
    """Restore and retrieve everything that was acknowledged and not forgotten, and compare every byte."""
    book = load.book
    listed = {point.point_id for point in manager.points(load.vm_id)}
    assert set(book.points) <= listed, "every acknowledged point is listed"
    stored = {each.storage_id for each in manager.list_application_data(load.task_id)}
    assert set(book.objects) <= stored, "all acknowledged application data is listed"
    for point_id, content in book.points.items():
        target = load.restores / point_id
        restored = manager.restore_vm(point_id, target=target)
        assert digest(Path(restored) / "root.raw") == content, f"the bytes of point {point_id}"
        shutil.rmtree(target)
    for storage_id, content in book.objects.items():
        data = manager.retrieve_application_data(storage_id)
        assert hashlib.sha256(data).hexdigest() == content, f"the bytes of object {storage_id}"
