"""Background work as one interface: a step, how long to wait before the next, and what to say of itself.

A worker does a bounded piece of work at each step and keeps its place itself, so that it can be stopped between any two
steps. Failures that may pass (and those of a node or disk that is in trouble) are logged once and tried again; anything
else ends the worker, and with it the service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log

RETRY_S: Final = 5.0
_PASSING: Final = frozenset({ErrorCode.DISK_FULL, ErrorCode.MISSING, ErrorCode.CORRUPT, ErrorCode.NOT_DURABLE})


class Worker(Protocol):
    """One kind of background work. `name` tells it apart in logs."""

    name: str

    async def step(self) -> float:
        """Do one bounded piece of work; return the seconds to wait before the next.

        Raises:
            HoldfastError: retryable, or of a disk or block in trouble: the step is tried again after `RETRY_S`.
        """
        ...

    def status(self) -> Mapping[str, int]:
        """Return figures of how it stands, by name."""
        ...


async def run_workers(workers: Sequence[Worker], clock: Clock, log: Log) -> None:
    """Run workers side by side until cancelled or until one of them fails for good.

    Raises:
        HoldfastError: what ended a worker.
    """
    async with plain_task_group() as group:
        for worker in workers:
            group.create_task(run_worker(worker, clock, log), name=worker.name)


async def run_worker(worker: Worker, clock: Clock, log: Log) -> None:
    """Run one worker until cancelled. Raises as `run_workers`."""
    trouble = ""
    while True:
        try:
            pause_s = await worker.step()
        except HoldfastError as error:
            if not error.retryable and error.code not in _PASSING:
                raise
            if error.message != trouble:
                trouble = error.message
                log.warning("background work waits", worker=worker.name, code=error.code.name, why=error.message)
            pause_s = RETRY_S
        else:
            trouble = ""
        await clock.sleep(pause_s)


class Pace:
    """How gently work is done: after a step, `gentleness` times as long as it took is waited.

    Gentleness 0 never waits, 1 works half of the time, 3 a quarter.
    """

    def __init__(self, clock: Clock, *, gentleness: float, pause_s_max: float = 10.0) -> None:
        """Begin with no step measured."""
        self._clock = clock
        self._gentleness = gentleness
        self._pause_s_max = pause_s_max
        self._began_s = 0.0

    def begin(self) -> None:
        """Say that a step begins now."""
        self._began_s = self._clock.monotonic_s()

    def pause_s(self) -> float:
        """Return how long to wait after the step that began last, seconds."""
        return min(self._pause_s_max, self._gentleness * (self._clock.monotonic_s() - self._began_s))
