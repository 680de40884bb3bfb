"""Channels and server credentials: sizes, keep-alive, and who may talk in plain text.

Keys of tenants cross these channels, so plain text is for this machine only (loopback and Unix sockets), on both ends.
Across machines it is mutual TLS or nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MESSAGE_BYTES_MAX
from holdfast_core.runtime.options import UNIX_SCHEME, TlsFiles, is_loopback

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
    """Open a channel to HOST:PORT or unix:PATH; it connects at the first call.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the address has another form, is not on this machine and there is no TLS,
            or a TLS file cannot be read.
    """
    local = is_loopback(address)
    if tls is None or address.startswith(UNIX_SCHEME):
        if not local:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"{address} is not on this machine, and without TLS keys would travel in the clear; give the TLS files",
            )
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read_pem(tls.ca),
        private_key=_read_pem(tls.key),
        certificate_chain=_read_pem(tls.cert),
    )
    return grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)


def check_bind(address: str, tls: TlsFiles | None) -> None:
    """Check that a service may listen on `address`.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it would speak plain text to other machines.
    """
    if tls is None and not is_loopback(address):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{address} can be reached from other machines; give the TLS files, or bind 127.0.0.1",
        )


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials of a server that takes only clients with a certificate of the same CA.

    Raises:
        HoldfastError: INVALID_ARGUMENT if a file cannot be read.
    """
    return grpc.ssl_server_credentials(
        [(_read_pem(tls.key), _read_pem(tls.cert))], root_certificates=_read_pem(tls.ca), require_client_auth=True
    )


def _read_pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the TLS file {path} cannot be read: {error.strerror}"
        ) from error
