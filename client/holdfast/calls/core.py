"""What every group of a manager's calls stands on: where the cluster is, tools made at the first call, jobs under way.

`AsyncCore` belongs to an event loop; `BlockingCore` runs one in a thread and has no logic of its own.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from holdfast.background import LoopThread
from holdfast.remote import CoordinatorCalls
from holdfast.results import Transfer
from holdfast.sampling import check_sample
from holdfast.sealers import Sealing, SealingProcesses, check_sealing
from holdfast.writing import Made, Toolbox, WriteJob
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.key_file import DataKey
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX, MIB, REPLICA_SETTLE_S, SAMPLE_DEFAULT
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.credentials import find_credential
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.options import TlsFiles, parse_addresses

if TYPE_CHECKING:
    from holdfast.aio import AsyncStateManager
    from holdfast.findings import RestoreReport
    from holdfast.images.point_image import PointImage
    from holdfast.reading import Reading
    from holdfast.serving import PointServer

COORDINATOR_VARIABLE: Final = "HOLDFAST_COORDINATOR"
RESTORE_DIR_VARIABLE: Final = "HOLDFAST_RESTORE_DIR"
KEY_FILE_VARIABLE: Final = "HOLDFAST_KEY_FILE"
SEALING_VARIABLE: Final = "HOLDFAST_SEALING"
NONCE_BYTES: Final = 16
_REPORTED_IDS_MAX: Final = 16_384
_TEACHING_BYTES: Final = 32 * MIB - 8192


class AsyncCore:
    """The part of an asynchronous manager that is no call of the cluster."""

    def __init__(
        self,
        coordinator: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        tenant: str | None = None,
        key_file: str | os.PathLike[str] | None = None,
        restore_dir: str | os.PathLike[str] | None = None,
        tls: TlsFiles | None = None,
        replica_wait_s: float = REPLICA_SETTLE_S,
        workers: int | None = None,
        sealing: Sealing | None = None,
        sample: float = SAMPLE_DEFAULT,
        clock: Clock | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Bind to a cluster; nothing connects yet.

        Args:
            coordinator: HOST:PORT of one or several coordinators, separated by commas; HOLDFAST_COORDINATOR if None.
            token: API token; without one it is looked for as `find_credential` says. Who has a certificate needs none.
            token_file: file of the token, read again when it changes.
            tenant: the tenant that is meant; HOLDFAST_TENANT, else the only one the caller has rights in, if None.
            key_file: file of the data key, for a tenant that keeps it itself; HOLDFAST_KEY_FILE if None.
            restore_dir: where restores without a target go, as VM/point/; HOLDFAST_RESTORE_DIR if None.
            tls: client certificate for coordinators and nodes; needed for all but this machine.
            replica_wait_s: how long a write, once at its quorum, waits for the other copies before it commits. With 0
                it commits at once and the other copies go on behind; `settle` waits for them.
            workers: threads for cutting, hashing, compressing; the number of processors if None.
            sealing: who seals raw volumes: "processes", "threads", or "auto", which takes processes where there is much
                to read and they can be started; HOLDFAST_SEALING, else "auto", if None.
            sample: share of the blocks that a change tracker calls unchanged to read and compare all the same, from 0
                to 1, at most 16 MiB a volume a run; 0 trusts every tracker.

        Raises:
            HoldfastError: INVALID_ARGUMENT if no coordinator is named, or an argument is malformed.
        """
        text = coordinator or os.environ.get(COORDINATOR_VARIABLE, "")
        if not text:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"no coordinator is named; give HOST:PORT or set {COORDINATOR_VARIABLE}"
            )
        self._addresses = parse_addresses(text)
        file = Path(token_file) if token_file is not None else None
        self._credential = find_credential(
            self._addresses, token=token, token_file=file, tenant=tenant, certificate=tls is not None
        )
        key_place = key_file or os.environ.get(KEY_FILE_VARIABLE)
        self._key_file = Path(key_place) if key_place else None
        place = restore_dir or os.environ.get(RESTORE_DIR_VARIABLE)
        self._restore_dir = Path(place) if place else None
        self._tls = tls
        self._replica_wait_s = replica_wait_s
        self._workers = workers or len(os.sched_getaffinity(0))
        self._sealing = check_sealing(sealing or os.environ.get(SEALING_VARIABLE) or "auto")
        self._sample = check_sample(sample)
        self._clock: Clock = clock or SystemClock()
        self._random_bytes = random_bytes
        self._tools: Toolbox | None = None
        self._calls: CoordinatorCalls | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._images: WeakSet[PointImage] = WeakSet()
        self._servers: set[PointServer] = set()
        self._last_transfer: Transfer | None = None
        self._last_restore: RestoreReport | None = None
        self._closed = False

    def _open(self) -> tuple[Toolbox, CoordinatorCalls]:
        """Make channels and threads at the first call, inside the loop they belong to."""
        if self._closed:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the state manager is closed")
        if self._tools is None or self._calls is None:
            data_key = None if self._key_file is None else _read_key_file(self._key_file)
            _keep_freed_memory()
            endpoints = Endpoints(self._addresses, tls=self._tls, credential=self._credential)
            self._calls = CoordinatorCalls(endpoints)
            self._tools = Toolbox(
                endpoints=endpoints,
                pool=NodePool(tls=self._tls, clock=self._clock),
                executor=ThreadPoolExecutor(self._workers, thread_name_prefix="holdfast"),
                processes=SealingProcesses(self._sealing, self._workers),
                clock=self._clock,
                workers=self._workers,
                random_bytes=self._random_bytes,
                replica_wait_s=self._replica_wait_s,
                report_damage=self._report_damage,
                timed=self._timed,
                data_key=data_key,
            )
        return self._tools, self._calls

    @property
    def _remote(self) -> CoordinatorCalls:
        return self._open()[1]

    @property
    def _reading(self) -> Reading:
        from holdfast.reading import Reading  # what only saves does not wait for all of this to load

        return Reading(*self._open())

    def _timed(self, transfer: Transfer) -> None:
        self._last_transfer = transfer

    async def _report_damage(self, block_ids: tuple[bytes, ...], resource_id: str) -> None:
        try:
            for at in range(0, min(len(block_ids), _REPORTED_IDS_MAX), ERROR_BLOCK_IDS_MAX):
                await self._remote.report_damage(block_ids[at : at + ERROR_BLOCK_IDS_MAX], resource_id)
        except HoldfastError:
            # The caller is about to hear of the damage itself, which matters more than that the report got lost.
            return

    @property
    def last_transfer(self) -> Transfer | None:
        """Times and counters of the write that committed last, of any task."""
        return self._last_transfer

    async def settle(self, timeout_s: float | None = None) -> bool:
        """Wait for copies that go on behind committed writes; returns whether none is left."""
        jobs = set(self._jobs)
        if jobs:
            await asyncio.wait(jobs, timeout=timeout_s)
        return all(job.done() for job in jobs)

    async def close(self) -> None:
        """Cancel what is under way, copies behind committed writes too, and release everything."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs:
            job.cancel()
        if self._jobs:
            await asyncio.wait(self._jobs)
        for server in tuple(self._servers):
            await server.close()
        for image in tuple(self._images):
            await image.close()
        if self._tools is not None:
            await self._tools.pool.close()
            await self._tools.endpoints.close()
            await self._tools.processes.ended()
            # Waits only for spans that already run; what was queued has been cancelled with its operation.
            self._tools.executor.shutdown(wait=True, cancel_futures=True)

    async def _run(self, job: WriteJob[Made], work: Coroutine[Any, Any, None]) -> Made:
        """Run a write as a task of the manager until its answer is there."""
        task = asyncio.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait((task, job.made), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))
            raise
        if job.made.done():
            return job.made.result()
        await task
        raise AssertionError("a write ends with an answer or an error")

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.exception()  # told to the caller, or about copies behind a commit that stands


class BlockingCore:
    """What the blocking face of a group of calls stands on: `StateManager` sets both."""

    _core: AsyncStateManager
    _loop: LoopThread


def _read_key_file(path: Path) -> DataKey:
    from holdfast.key_file import read_key_file  # most tenants leave their keys to the coordinator

    return read_key_file(path)


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep what is freed instead of returning it to the system at every turn; once a process.

    Batches of a megabyte come and go all the time, and where fresh pages are dear (2 ms a MB on a virtual machine) that
    is a tenth of all work. glibc learns its thresholds from the largest mapped block that was ever freed: one block of
    nearly 32 MiB, never touched, is all it takes, and other C libraries do not mind. A second one would come out of the
    memory that is now kept, all of it touched, and stay with the thread that asked for it.
    """
    bytes(_TEACHING_BYTES)
