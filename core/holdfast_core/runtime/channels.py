"""Channels: sizes, keep-alive, and who may talk in plain text.

Keys of tenants cross these channels, so plain text is for this machine only (loopback and Unix sockets). Across
machines a client speaks mutual TLS or nothing; a service serves plain text there only where an option says so (ADR
0062).
"""

from __future__ import annotations

from typing import Any, Final

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MESSAGE_BYTES_MAX
from holdfast_core.runtime.options import UNIX_SCHEME, TlsFiles, is_loopback
from holdfast_core.runtime.tls import TlsMaterial, TlsReader, channel_credentials

# An error may name 1,024 blocks of 32 bytes, which base 64 makes a third longer on the way; gRPC's own bound is 8 KiB.
_METADATA_BYTES_MAX: Final = 96 * 1024

_COMMON_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", _METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES_MAX),
)

_CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    *_COMMON_OPTIONS,
    # A peer that vanished without closing (power cut, cable) is noticed within 15 s, also while a stream is idle.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A coordinator that restarts is found again quickly; gRPC's own first wait is 1 s and its longest 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A channel's failures and connections are its own: what another channel of the process found out is not inherited.
    ("grpc.use_local_subchannel_pool", 1),
    # An http_proxy variable meant for the web must not carry the cluster's traffic.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    *_COMMON_OPTIONS,
    # Two processes on one port would otherwise both start and share the calls between them.
    ("grpc.so_reuseport", 0),
    # Accept the keep-alive pings that the channels above send.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def open_channel(address: str, *, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """Open a channel to HOST:PORT or unix:PATH; it connects at the first call, and keeps to the files as they are now.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the address has another form, is not on this machine and there is no TLS,
            or the TLS files cannot be used.
    """
    return _open(address, TlsReader(tls).current() if tls is not None else None)


class Channels:
    """Channels by address, opened when first asked for. Belongs to one event loop.

    When the TLS files change, everything is opened anew at the next question. What was open before stays so until the
    change after that, for the calls under way on it.
    """

    def __init__(self, tls: TlsFiles | None = None) -> None:
        """Read the TLS files.

        Raises:
            HoldfastError: INVALID_ARGUMENT if they cannot be used.
        """
        self._reader = TlsReader(tls) if tls is not None else None
        self._open: dict[str, grpc.aio.Channel] = {}
        self._replaced: list[grpc.aio.Channel] = []
        self._stale: list[grpc.aio.Channel] = []

    def to(self, address: str) -> grpc.aio.Channel:
        """Return the channel to an address.

        Raises:
            HoldfastError: INVALID_ARGUMENT as `open_channel`.
        """
        if self._reader is not None and self._reader.changed() is not None:
            self._stale += self._replaced
            self._replaced, self._open = list(self._open.values()), {}
        channel = self._open.get(address)
        if channel is None:
            material = self._reader.current() if self._reader is not None else None
            channel = self._open[address] = _open(address, material)
        return channel

    async def tidy(self) -> None:
        """Close channels that were replaced before the last change."""
        while self._stale:
            await self._stale.pop().close()

    async def close(self) -> None:
        """Close all channels; calls under way end as cancelled."""
        self._stale += [*self._replaced, *self._open.values()]
        self._replaced, self._open = [], {}
        await self.tidy()


def _open(address: str, tls: TlsMaterial | None) -> grpc.aio.Channel:
    local = is_loopback(address)
    if tls is None or address.startswith(UNIX_SCHEME):
        if not local:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"{address} is not on this machine, and without TLS keys would travel in the clear; give the TLS files",
            )
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=_CHANNEL_OPTIONS)


def check_bind(address: str, tls: TlsFiles | None, *, plaintext_on_network: bool = False) -> None:
    """Check that a service may listen on `address`.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it would speak plain text to other machines and nobody asked for that.
    """
    if tls is None and not plaintext_on_network and not is_loopback(address):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{address} can be reached from other machines; give the TLS files, or bind 127.0.0.1 "
            "(--insecure-plaintext-on-network serves plain text there, for a network that encrypts below)",
        )
