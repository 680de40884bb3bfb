"""The server's side of NBD's negotiation: from the greeting to the export that a client has chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.serving.device import Device
from holdfast_core.model import nbd
from holdfast_core.model.nbd import Option, Reply, Transmission

OPTIONS_MAX: Final = 1000
"""Options that a client may send before it chooses an export."""

CONTEXT_ID: Final = 1
"""The number that `base:allocation` has on every connection."""

_FLAGS: Final = Transmission.HAS_FLAGS | Transmission.SEND_FLUSH | Transmission.CAN_MULTI_CONN | Transmission.SEND_CACHE
_WRITABLE: Final = Transmission.SEND_FUA | Transmission.SEND_TRIM | Transmission.SEND_WRITE_ZEROES
_PREFERRED_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Chosen:
    """What came out of a negotiation.

    Attributes:
        device: the export.
        structured: whether reads are answered in chunks.
        allocation: whether the client may ask for `base:allocation`.
    """

    device: Device
    structured: bool
    allocation: bool


class Negotiation:
    """One client's negotiation. `run` returns the export, or None if the client left in good order."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, exports: Mapping[str, Device]
    ) -> None:
        """Bind to a connection; `exports` by name, "" is the first."""
        self._reader = reader
        self._writer = writer
        self._exports = exports
        self._structured = False
        self._allocation_of: str | None = None
        self._zeroes = True
        self._chosen: Chosen | None = None
        self._answers: dict[int, Callable[[bytes], None]] = {
            Option.LIST: self._list,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._use_chunks,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
        }

    async def run(self) -> Chosen | None:
        """Negotiate.

        Raises:
            NbdWireError: the client does not keep to the protocol, or names an export that there is none.
            asyncio.IncompleteReadError, ConnectionError: it went away.
        """
        self._writer.write(nbd.pack_greeting(nbd.Handshake.FIXED_NEWSTYLE | nbd.Handshake.NO_ZEROES))
        (flags,) = nbd.CLIENT_FLAGS.unpack(await self._reader.readexactly(nbd.CLIENT_FLAGS.size))
        if flags & ~(nbd.Handshake.FIXED_NEWSTYLE | nbd.Handshake.NO_ZEROES):
            raise nbd.NbdWireError("the client asks for a negotiation that is not known")
        self._zeroes = not flags & nbd.Handshake.NO_ZEROES
        for _ in range(OPTIONS_MAX):
            head = nbd.unpack_option_header(await self._reader.readexactly(nbd.OPTION_HEADER.size))
            data = await self._reader.readexactly(head.length)
            if head.option == Option.EXPORT_NAME:
                return await self._export_name(data)
            if head.option == Option.ABORT:
                self._reply(Option.ABORT, Reply.ACK)
                await self._writer.drain()
                return None
            self._answer(head.option, data)
            await self._writer.drain()
            if self._chosen is not None:
                return self._chosen
        raise nbd.NbdWireError(f"the client sent {OPTIONS_MAX} options and chose no export")

    def _answer(self, option: int, data: bytes) -> None:
        answer = self._answers.get(option)
        if answer is None:
            self._reply(option, Reply.ERR_UNSUP, b"this option is not supported")
            return
        try:
            answer(data)
        except nbd.NbdWireError as error:
            self._reply(option, Reply.ERR_INVALID, str(error).encode())

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._writer.write(nbd.pack_option_reply(option, kind, data))

    async def _export_name(self, data: bytes) -> Chosen:
        device = self._exports.get(nbd.decode_name(data))
        if device is None:
            raise nbd.NbdWireError("the client names an export that there is none, in a way that takes no refusal")
        self._writer.write(nbd.pack_export_name_reply(self._export_info(device), zeroes=self._zeroes))
        await self._writer.drain()
        return self._choice(device)

    def _choice(self, device: Device) -> Chosen:
        wanted = self._allocation_of
        known = wanted is not None and self._exports.get(wanted) is device
        return Chosen(device, self._structured, known and self._structured)

    def _export_info(self, device: Device) -> nbd.ExportInfo:
        flags = _FLAGS | (Transmission.READ_ONLY if device.read_only else _WRITABLE)
        return nbd.ExportInfo(device.size_bytes, flags | (Transmission.SEND_DF if self._structured else 0))

    def _list(self, data: bytes) -> None:
        if data:
            raise nbd.NbdWireError("a list of exports takes no data")
        for name, device in self._exports.items():
            if name:
                self._reply(Option.LIST, Reply.SERVER, nbd.pack_server(name, device.description))
        self._reply(Option.LIST, Reply.ACK)

    def _info(self, data: bytes) -> None:
        self._tell(Option.INFO, data)

    def _go(self, data: bytes) -> None:
        device = self._tell(Option.GO, data)
        if device is not None:
            self._chosen = self._choice(device)

    def _tell(self, option: Option, data: bytes) -> Device | None:
        name, infos = nbd.unpack_info_request(data)
        device = self._exports.get(name)
        if device is None:
            self._reply(option, Reply.ERR_UNKNOWN, b"there is no such export")
            return None
        self._reply(option, Reply.INFO, nbd.pack_export_info(self._export_info(device)))
        if nbd.Info.NAME in infos:
            self._reply(option, Reply.INFO, nbd.pack_text_info(nbd.Info.NAME, device.name))
        if nbd.Info.DESCRIPTION in infos:
            self._reply(option, Reply.INFO, nbd.pack_text_info(nbd.Info.DESCRIPTION, device.description))
        sizes = nbd.BlockSizes(1, _PREFERRED_BYTES, nbd.REQUEST_BYTES_MAX)
        self._reply(option, Reply.INFO, nbd.pack_block_size_info(sizes))
        self._reply(option, Reply.ACK)
        return device

    def _use_chunks(self, data: bytes) -> None:
        if data:
            raise nbd.NbdWireError("asking for structured replies takes no data")
        self._structured = True
        self._reply(Option.STRUCTURED_REPLY, Reply.ACK)

    def _list_contexts(self, data: bytes) -> None:
        self._contexts(Option.LIST_META_CONTEXT, nbd.unpack_meta_query(data), listing=True)

    def _set_contexts(self, data: bytes) -> None:
        self._allocation_of = None
        query = nbd.unpack_meta_query(data)
        if self._contexts(Option.SET_META_CONTEXT, query, listing=False):
            self._allocation_of = query.export

    def _contexts(self, option: Option, query: nbd.MetaQuery, *, listing: bool) -> bool:
        """Answer which contexts there are; returns whether `base:allocation` is among them."""
        if not self._structured:
            raise nbd.NbdWireError("contexts need structured replies, which have to be asked for before")
        if query.export not in self._exports:
            self._reply(option, Reply.ERR_UNKNOWN, b"there is no such export")
            return False
        matching = {nbd.CONTEXT_ALLOCATION, "base:"} if listing else {nbd.CONTEXT_ALLOCATION}
        found = bool(matching & set(query.queries)) or (listing and not query.queries)
        if found:
            context = nbd.pack_meta_context(0 if listing else CONTEXT_ID, nbd.CONTEXT_ALLOCATION)
            self._reply(option, Reply.META_CONTEXT, context)
        self._reply(option, Reply.ACK)
        return found
