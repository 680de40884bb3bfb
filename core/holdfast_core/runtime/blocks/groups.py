"""Task groups whose failure is one plain error instead of a group of them.

Callers of Holdfast handle a `HoldfastError`; that several tasks failed at once is nothing they could act on. The first
typed error wins; the rest of the group is its `__context__`, which tracebacks do not show.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from holdfast_core.model.errors import HoldfastError


@asynccontextmanager
async def plain_task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Run an `asyncio.TaskGroup`; if tasks fail, the others are cancelled and one of the errors is raised.

    Raises:
        HoldfastError: the first that a task raised; any other exception if no task raised one.
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        leaves = list(_leaves(failures))
        typed = [leaf for leaf in leaves if isinstance(leaf, HoldfastError)]
        first = (typed or leaves)[0]
        # Its own cause stays; the group around it would only double every traceback.
        first.__suppress_context__ = True
        raise first  # noqa: B904


def _leaves(failures: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for failure in failures.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            yield from _leaves(failure)
        else:
            yield failure
