"""Texts that people give as options, turned into values: addresses, sizes and TLS files.

Used by the command line, the services' own options and the SDK's arguments, so that all say the same of one mistake.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

_UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1 << 10,
    "m": 1000**2,
    "mb": 1000**2,
    "mib": 1 << 20,
    "g": 1000**3,
    "gb": 1000**3,
    "gib": 1 << 30,
    "t": 1000**4,
    "tb": 1000**4,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z", re.ASCII)
UNIX_SCHEME: Final = "unix:"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one party in mutual TLS.

    Attributes:
        ca: certificates that sign the other side's certificate.
        cert: own certificate, with intermediates if any.
        key: its private key.
    """

    ca: Path
    cert: Path
    key: Path


def tls_files(*, ca: Path | None, cert: Path | None, key: Path | None) -> TlsFiles | None:
    """Return the files, or None if none was given.

    Raises:
        HoldfastError: INVALID_ARGUMENT if only some were given; Holdfast speaks mutual TLS or none.
    """
    if ca is None and cert is None and key is None:
        return None
    if ca is None or cert is None or key is None:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            "TLS takes three files: the CA, the certificate and its key; some are missing",
        )
    return TlsFiles(ca=ca, cert=cert, key=key)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; an IPv6 host stands in brackets, as in [::1]:7400.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it has another form or the port is not 0 to 65535.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = host[1:-1] if bracketed else host
    if not colon or not plain or (":" in plain and not bracketed) or not (port.isascii() and port.isdigit()):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text!r} is not an address; write HOST:PORT")
    if int(port) > 65535:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text!r} is not an address; ports go up to 65535")
    return plain, int(port)


def format_address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return the addresses of a list that is separated by commas; each is HOST:PORT or unix:PATH.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty or one has another form.
    """
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "no address was given; write HOST:PORT[,HOST:PORT]")
    for address in addresses:
        if not address.startswith(UNIX_SCHEME):
            parse_address(address)
    return addresses


def is_loopback(address: str) -> bool:
    """Return whether traffic to or from this address (HOST:PORT or unix:PATH) never leaves the machine.

    Names other than `localhost` are not looked up: what they resolve to can change after the check.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is no address.
    """
    if address.startswith(UNIX_SCHEME):
        return True
    host, _ = parse_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_size(text: str) -> int:
    """Return bytes of a size such as 4096, 64KiB, 10GB or 1.5GiB (KB is 1,000 bytes, KiB 1,024).

    Raises:
        HoldfastError: INVALID_ARGUMENT if it has another form or is not a whole number of bytes.
    """
    match = _SIZE.match(text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text!r} is not a size; write e.g. 65536, 64KiB or 10GiB")
    size = float(match.group(1)) * unit if "." in match.group(1) else int(match.group(1)) * unit
    if size != int(size):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size_bytes: int) -> str:
    """Return a size for people, in units of 1,024 with three digits, e.g. "1.27 GiB"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{size:.3g} {unit}"
