"""Nodes that answer nothing for a while, and nodes without space."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from holdfast.testing import MemoryCluster
from tests.client.rig import store_of

STALLED_CALLS = ("put", "get", "has")


@contextmanager
def stalled(cluster: MemoryCluster, number: int) -> Iterator[None]:
    """Let every call of a node's disk hang until the end, as a disk does that does not come back."""
    store: Any = store_of(cluster, number)
    go_on = threading.Event()

    def hanging(call: Callable[..., Any]) -> Callable[..., Any]:
        def hang(*arguments: Any, **options: Any) -> Any:
            go_on.wait()
            return call(*arguments, **options)

        return hang

    for name in STALLED_CALLS:
        setattr(store, name, hanging(getattr(store, name)))
    try:
        yield
    finally:
        for name in STALLED_CALLS:
            delattr(store, name)
        go_on.set()


def fill(cluster: MemoryCluster, number: int) -> None:
    """Leave a node no space for any further block."""
    store: Any = store_of(cluster, number)
    store._capacity_bytes = store._used_bytes
