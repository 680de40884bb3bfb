"""A client of an NBD server for several threads, over as many connections as the export allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from holdfast.sources.nbd_connection import (
    ANSWER_TIMEOUT_S,
    NbdAsked,
    NbdConnection,
    NbdEndpoint,
    NbdExport,
    NbdExtent,
)
from holdfast_core.model.errors import ErrorCode, HoldfastError

__all__ = ["NbdAsked", "NbdClient", "NbdEndpoint", "NbdExport", "NbdExtent"]

CONNECTIONS_DEFAULT: Final = 4


class NbdClient:
    """Reads one export. Everything may be called from several threads at once; `close` ends what is under way.

    The first connection is made at once. More follow when threads wait for one and the export may be read over several
    (`CAN_MULTI_CONN`; a server without it may serve one alone and leave the others hanging).
    """

    def __init__(
        self,
        endpoint: NbdEndpoint,
        asked: NbdAsked = NbdAsked(),
        *,
        connections_max: int = CONNECTIONS_DEFAULT,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """Connect.

        Args:
            endpoint: where the server listens.
            asked: the export, and the metadata contexts that `extents` will be asked about. Contexts that the server
                does not have are left out: see `export.contexts`.
            connections_max: how many connections may be open.
            timeout_s: how long an answer may take.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        self._endpoint = endpoint
        self._again = NbdAsked(asked.export, asked.contexts)
        self._timeout_s = timeout_s
        first = NbdConnection(endpoint, asked, timeout_s=timeout_s)
        self.export: NbdExport = first.export
        self._room = connections_max - 1 if first.export.shareable else 0
        self._condition = threading.Condition()
        self._all = {first}
        self._idle = [first]
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Size of the export."""
        return self.export.size_bytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        with self._connection() as connection:
            connection.read_into(offset, buffer)

    def extents(self, context: str, start: int, end: int) -> Iterator[NbdExtent]:
        """Yield what a context of `export.contexts` says of the range, ascending and without gaps.

        Neighbours may have the same flags. It asks as it goes, so that no answer is held whole.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        at = start
        while at < end:
            with self._connection() as connection:
                told = connection.block_status(context, at, end)
            yield from told
            at = told[-1].end

    def close(self) -> None:
        """Close all connections; whoever waits for an answer gets SOURCE_UNREADABLE. May be called more than once."""
        with self._condition:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._all.difference(idle):
                connection.shut()
            self._condition.notify_all()
        for connection in idle:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[NbdConnection]:
        connection = self._lent()
        try:
            yield connection
        finally:
            self._returned(connection)

    def _lent(self) -> NbdConnection:
        with self._condition:
            while True:
                if self._closed or not (self._all or self._room):
                    raise self._gone()
                if self._idle:
                    return self._idle.pop()
                if self._room:
                    self._room -= 1
                    break
                self._condition.wait()
        return self._another()

    def _another(self) -> NbdConnection:
        """Open one more connection; where the server gives no more, wait for one of those there are."""
        try:
            made = NbdConnection(self._endpoint, self._again, timeout_s=self._timeout_s)
        except HoldfastError:
            with self._condition:
                self._room = 0
                if not self._all:
                    raise
            return self._lent()
        same = made.export.size_bytes == self.size_bytes and made.export.contexts == self.export.contexts
        with self._condition:
            if same and not self._closed:
                self._all.add(made)
                return made
        made.close()
        if same:
            raise self._gone()
        raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the export {made.name} became another one while it was read")

    def _returned(self, connection: NbdConnection) -> None:
        with self._condition:
            keep = not (connection.broken or self._closed)
            if keep:
                self._idle.append(connection)
            else:
                # Not replaced: a server that failed one answer is not asked again behind the caller's back.
                self._all.discard(connection)
                self._room = 0
            self._condition.notify_all()
        if not keep:
            connection.close()

    def _gone(self) -> HoldfastError:
        return HoldfastError(
            ErrorCode.SOURCE_UNREADABLE, f"the export of {self._endpoint} cannot be read: its connections are closed"
        )
