"""Who seals the spans of a volume: threads of this process, or processes of their own.

Processes serve volumes that can be read by their descriptor, and pay from a few hundred megabytes on: each takes a
twentieth of a CPU second to start. Those of a manager are shared by its sessions, started with the first that is worth
it and ended with the last. While they load, spans wait for them; threads seal where they cannot be loaded. Which of the
two made a block changes nothing of it, nor of any count.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Container, Sequence
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol, TypeAlias, get_args

from holdfast.descriptors import RawReader
from holdfast.sealing import SealingPool
from holdfast.sealing_messages import SpanRequest, pack_entries
from holdfast.spans import SealedSpan, SpanContext, SpanSource, leaf_entries, seal_volume_span
from holdfast_core.model.block import Codec, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lent import SealingKeys
from holdfast_core.model.limits import MIB, RPC_TIMEOUT_S
from holdfast_core.model.tree import VolumeLeaf

_log = logging.getLogger(__name__)

Sealing: TypeAlias = Literal["auto", "threads", "processes"]
"""Whether large raw volumes are sealed by processes: where it pays and is possible, never, or always."""

PROCESS_BYTES_MIN: Final = 256 * MIB
PROCESSES_MAX: Final = 4

LOADING_S: Final = 2.0
"""How long a span waits for processes that load. They take a tenth of a second where nothing is amiss."""


def check_sealing(text: str) -> Sealing:
    """Return the setting that a text names.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it names none.
    """
    for known in get_args(Sealing):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise HoldfastError(
        ErrorCode.INVALID_ARGUMENT, f"sealing is one of {', '.join(get_args(Sealing))}, and not {text!r}"
    )


@dataclass(frozen=True, slots=True)
class LeafSpans:
    """The spans of one leaf, to be sealed.

    Attributes:
        offset: where the leaf begins in the volume, in bytes.
        spans: first and end slot of each.
        block_bytes: size of the volume's blocks.
        parent, base: the leaf at the same place in earlier points.
        delta_every: see `holdfast.spans.seal_volume_span`.
    """

    offset: int
    spans: Sequence[tuple[int, int]]
    block_bytes: int
    parent: VolumeLeaf | None
    base: VolumeLeaf | None
    delta_every: int = 0


class VolumeSealer(Protocol):
    """Seals one volume's spans."""

    def submit(self, leaf: LeafSpans) -> list[Future[SealedSpan]]:
        """Begin to seal a leaf's spans. The futures fail as `seal_volume_span` does, and may be cancelled."""
        ...


class ThreadSealer:
    """Seals in threads of this process; for every kind of source."""

    def __init__(
        self, executor: Executor, context: SpanContext[SealedBlock], source: SpanSource, *, damaged: Container[bytes]
    ) -> None:
        """Bind to a volume; entries that name an id in `damaged` are sealed again."""
        self._executor = executor
        self._context = context
        self._source = source
        self._damaged = damaged

    def submit(self, leaf: LeafSpans) -> list[Future[SealedSpan]]:
        """Begin to seal a leaf's spans."""
        parent = leaf_entries(leaf.parent, self._damaged)
        base = leaf_entries(leaf.base, self._damaged)
        return [
            self._executor.submit(
                seal_volume_span,
                self._context,
                self._source,
                leaf_offset=leaf.offset,
                first_slot=first,
                end_slot=end,
                block_bytes=leaf.block_bytes,
                parent=parent,
                base=base,
                delta_every=leaf.delta_every,
            )
            for first, end in leaf.spans
        ]


class _WaitingSpans:
    """The spans of a leaf until it is known who seals them."""

    def __init__(self, leaf: LeafSpans) -> None:
        self.futures: list[Future[SealedSpan]] = [Future() for _ in leaf.spans]
        self._leaf = leaf
        self._lock = threading.Lock()
        self._given = False

    def give(self, seal: Callable[[LeafSpans], list[Future[SealedSpan]]]) -> bool:
        """Have `seal` seal them, unless somebody does already or nobody wants them any more; return whether it does."""
        with self._lock:
            if self._given:
                return False
            self._given = True
        wanted = [future.set_running_or_notify_cancel() for future in self.futures]
        if any(wanted):
            for future, is_wanted, sealed in zip(self.futures, wanted, seal(self._leaf), strict=True):
                if is_wanted:
                    sealed.add_done_callback(partial(_hand_on, future))
                else:
                    sealed.cancel()
        return any(wanted)


def _hand_on(future: Future[SealedSpan], sealed: Future[SealedSpan]) -> None:
    if sealed.cancelled():
        future.set_exception(HoldfastError(ErrorCode.CANCELLED, "the state manager was closed"))
    elif (error := sealed.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(sealed.result())


class ProcessSealer:
    """Seals in processes, and in threads where those cannot be loaded, or not soon. Belongs to an event loop.

    What comes while they load waits for them: loading takes as many processors as they will, so that sealing beside it
    gains nothing, and a thread seals slower than a process (ADR 0073).
    """

    def __init__(self, pool: SealingPool, volume: int, threads: ThreadSealer, *, damaged: Container[bytes]) -> None:
        """Bind to a volume that the pool knows by number."""
        self._pool = pool
        self._volume = volume
        self._threads = threads
        self._damaged = damaged
        self._late = False

    def submit(self, leaf: LeafSpans) -> list[Future[SealedSpan]]:
        """Begin to seal a leaf's spans."""
        started = self._pool.started
        if started.done():
            return self._seal(leaf)
        if self._late:
            return self._threads.submit(leaf)
        waiting = _WaitingSpans(leaf)
        asyncio.get_running_loop().call_later(LOADING_S, self._give_up, waiting)
        started.add_done_callback(lambda _: waiting.give(self._seal))
        return waiting.futures

    def _give_up(self, waiting: _WaitingSpans) -> None:
        self._late = waiting.give(self._threads.submit) or self._late

    def _seal(self, leaf: LeafSpans) -> list[Future[SealedSpan]]:
        """Begin to seal, once it is known whether there are processes."""
        if self._pool.started.exception() is not None:
            return self._threads.submit(leaf)
        parent = pack_entries(leaf.parent, self._damaged)
        base = pack_entries(leaf.base, self._damaged)
        return [
            self._pool.submit(
                SpanRequest(
                    self._volume, leaf.offset, first, end, leaf.block_bytes, parent, base, delta_every=leaf.delta_every
                )
            )
            for first, end in leaf.spans
        ]


class SessionProcesses:
    """The processes as one session has them."""

    def __init__(self, pool: SealingPool, session: int) -> None:
        """Bind to a pool; `session` is a number that no other session of it has."""
        self._pool = pool
        self._session = session

    def sealer(
        self,
        source: RawReader,
        threads: ThreadSealer,
        *,
        codec: Codec,
        keys: SealingKeys,
        damaged: Container[bytes],
    ) -> VolumeSealer:
        """Return a sealer of a volume; `threads` seal where the processes do not come."""
        volume = self._pool.open_volume(source, session=self._session, codec=codec, keys=keys)
        return ProcessSealer(self._pool, volume, threads, damaged=damaged)


class SealingProcesses:
    """The processes of a manager. Belongs to its event loop."""

    def __init__(self, sealing: Sealing, workers: int) -> None:
        """Start nothing yet. `workers` is how many spans are worth sealing at once."""
        self._sealing = sealing
        self._processes = min(workers, PROCESSES_MAX)
        self._impossible = False
        self._pool: SealingPool | None = None
        self._sessions = 0
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lend(self, data_bytes: int) -> AsyncIterator[SessionProcesses | None]:
        """Lend the processes to a session that has about `data_bytes` to read by descriptors; None is: use threads.

        Raises:
            HoldfastError: INVALID_ARGUMENT if there must be processes and they cannot be started.
        """
        pool = self._take(data_bytes)
        if pool is None:
            yield None
            return
        self._sessions += 1
        session = self._sessions
        pool.session_count += 1
        try:
            if self._sealing == "processes":
                await _started(pool)
            yield SessionProcesses(pool, session)
        finally:
            self._give_back(pool, session)

    async def ended(self) -> None:
        """Wait until every process that nobody uses any more is gone."""
        if self._ending:
            await asyncio.wait(self._ending)

    def _take(self, data_bytes: int) -> SealingPool | None:
        """Return a pool that works or is being started, if there should be one."""
        always = self._sealing == "processes"
        if self._sealing == "threads" or not data_bytes or (not always and data_bytes < PROCESS_BYTES_MIN):
            return None
        if self._pool is None or self._pool.failure is not None:
            if self._impossible and not always:
                return None
            try:
                self._pool = SealingPool(self._processes)
            except HoldfastError as error:
                if always:
                    raise
                self._is_impossible(error)
                return None
        return self._pool

    def _give_back(self, pool: SealingPool, session: int) -> None:
        pool.session_count -= 1
        if pool.started.done() and (error := pool.started.exception()) is not None and self._sealing == "auto":
            self._is_impossible(error)
        if pool.session_count:
            pool.forget(session)
            return
        if self._pool is pool:
            self._pool = None
        # Beside the last batches and the commit, which need nothing of the processes: to take apart what two of them
        # held takes the system longer than a node needs to make a batch durable.
        ending = asyncio.create_task(asyncio.to_thread(pool.close))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _is_impossible(self, error: BaseException) -> None:
        """Remember that there is no use in trying again, and say so once."""
        if not self._impossible:
            self._impossible = True
            _log.warning("volumes are sealed in threads, which takes longer: %s", error)


async def _started(pool: SealingPool) -> None:
    try:
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(pool.started)), RPC_TIMEOUT_S)
    except TimeoutError:
        raise HoldfastError(
            ErrorCode.INTERNAL, f"the processes that seal did not start within {RPC_TIMEOUT_S:.0f} s"
        ) from None
