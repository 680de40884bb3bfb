"""Watches inside one process: who watches which prefix, and what each has yet to see.

Everything here runs on the event loop. A watcher that falls behind by more than `BATCHES_WAITING_MAX` batches loses its
queue and is told to list again, which is what a compacted watch on etcd comes to as well; so memory stays bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

from holdfast_core.runtime.metadata.store import WatchBatch

BATCHES_WAITING_MAX: Final = 1024


class Subscription:
    """What one watcher of one prefix has yet to see."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._waiting: deque[WatchBatch] = deque()
        self._behind = False
        self._closed = False
        self._changed = asyncio.Event()

    def offer(self, batch: WatchBatch) -> None:
        """Queue what of the batch lies below the prefix; drop all and note the loss if the queue is full."""
        puts = tuple(item for item in batch.puts if item.key.startswith(self.prefix))
        deletes = tuple(key for key in batch.deletes if key.startswith(self.prefix))
        if not (puts or deletes) or self._behind:
            return
        if len(self._waiting) >= BATCHES_WAITING_MAX:
            self._waiting.clear()
            self._behind = True
        else:
            self._waiting.append(WatchBatch(batch.revision, puts, deletes))
        self._changed.set()

    def close(self) -> None:
        """End the subscription: `ended` is true from now on."""
        self._closed = True
        self._changed.set()

    @property
    def ended(self) -> bool:
        """Whether the store was closed."""
        return self._closed

    def restart(self) -> None:
        """Forget what waits, before the watcher lists anew."""
        self._waiting.clear()
        self._behind = False

    async def next_batch(self) -> WatchBatch | None:
        """Return the next batch; None if the watcher has to list again or the subscription has ended."""
        while not self._waiting:
            if self._behind or self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()


class WatchHub:
    """All subscriptions of one store."""

    def __init__(self) -> None:
        # In the order in which they came: in which order watchers wake must not hang on where they lie in memory.
        self._subscriptions: dict[Subscription, None] = {}
        self._closed = False

    def subscribe(self, prefix: str) -> Subscription:
        """Return a subscription that sees every batch published from now on; on a closed hub it has ended."""
        subscription = Subscription(prefix)
        if self._closed:
            subscription.close()
        else:
            self._subscriptions[subscription] = None
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget the subscription."""
        self._subscriptions.pop(subscription, None)

    def publish(self, batches: Iterable[WatchBatch]) -> None:
        """Offer the batches, oldest first, to every subscription."""
        for batch in batches:
            for subscription in self._subscriptions:
                subscription.offer(batch)

    def close(self) -> None:
        """End all subscriptions."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()
        self._subscriptions.clear()
