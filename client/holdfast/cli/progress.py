"""How far a long command is, on stderr: a bar on a terminal, else a plain line now and then.

Plain lines begin only after a few seconds, so that a script's log holds them for what is long and nothing for what is
not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast import Progress
    from holdfast.results import ProgressCallback

_LINE_INTERVAL_S: Final = 5.0


@contextmanager
def shown(what: str, *, clock: Clock | None = None) -> Iterator[ProgressCallback]:
    """Yield a callback for the SDK that shows the progress of `what`, e.g. "snapshot of web-1"."""
    if sys.stderr.isatty():
        with _bar(what) as callback:
            yield callback
    else:
        yield _lines(what, clock if clock is not None else SystemClock(), sys.stderr.write)


@contextmanager
def counted(what: str, *, clock: Clock | None = None) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows how far `what` is, where that is no number of bytes: a phrase that changes."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.status import Status

        with Status(what, console=Console(stderr=True)) as status:
            yield lambda phrase: status.update(f"{what}: {phrase}")
    else:
        yield _phrases(what, clock if clock is not None else SystemClock(), sys.stderr.write)


def _phrases(what: str, clock: Clock, write: Callable[[str], object]) -> Callable[[str], None]:
    last_s = clock.monotonic_s()

    def show(phrase: str) -> None:
        nonlocal last_s
        now_s = clock.monotonic_s()
        if now_s - last_s >= _LINE_INTERVAL_S:
            last_s = now_s
            write(f"holdfast: {what}: {phrase}\n")

    return show


@contextmanager
def _bar(what: str) -> Iterator[ProgressCallback]:
    # Imported here: a tenth of a second that a script does not pay.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(progress: Progress) -> None:
            bar.update(
                task,
                description=f"{what}: {progress.phase}",
                completed=progress.bytes_done,
                total=progress.bytes_total or None,
            )

        yield update


def _lines(what: str, clock: Clock, write: Callable[[str], object]) -> ProgressCallback:
    last_s = clock.monotonic_s()

    def update(progress: Progress) -> None:
        nonlocal last_s
        now_s = clock.monotonic_s()
        if now_s - last_s < _LINE_INTERVAL_S:
            return
        last_s = now_s
        done = format_size(progress.bytes_done)
        if progress.bytes_total:
            share = 100 * progress.bytes_done // progress.bytes_total
            done = f"{done} of {format_size(progress.bytes_total)} ({share} %)"
        write(f"holdfast: {what}: {progress.phase} {done}\n")

    return update
