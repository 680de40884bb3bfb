"""TLS files that are replaced while services and clients run (ADR 0087).

Certificates live for days, processes for months. Whoever opens a connection asks the reader first: it looks at the
files' stamps, and reads them again when one has changed. Files are replaced one after the other, so for a moment key
and certificate do not belong together; until they do, what was read before goes on to be used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import TlsFiles

# Of each file: when it changed, nanoseconds; its length; its inode. None for one that is not there.
_Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What the files of one party hold, as PEM; certificate and key belong together.

    Attributes:
        ca: certificates that sign the other side's.
        cert: own certificate, with intermediates if any.
        key: its private key.
        serial: the own certificate's serial number, to tell one from the next.
    """

    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)
    serial: int


class TlsReader:
    """Reads the files of one party, and reads them again when they changed. Safe to share between threads."""

    def __init__(self, files: TlsFiles, *, notice: Callable[[str], None] | None = None) -> None:
        """Read the files; `notice` is told of each later change, and of files that do not fit together.

        Raises:
            HoldfastError: INVALID_ARGUMENT if one cannot be read, or they do not fit together.
        """
        self._files = files
        self._notice = notice
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._material = _read(files)

    def current(self) -> TlsMaterial:
        """Return what was read last and fits together; the files are not looked at."""
        with self._lock:
            return self._material

    def changed(self) -> TlsMaterial | None:
        """Look at the files; return what they hold now if that is new, else None.

        None too while new files cannot be read or do not fit together: the old ones go on to be used.
        """
        with self._lock:
            # Before the files are read: what changes while they are read is seen as a change next time.
            stamp = self._look()
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            try:
                material = _read(self._files)
            except HoldfastError as error:
                self._tell(f"{error.message}; what was read before is still used")
                return None
            if material == self._material:
                return None
            self._material = material
            self._tell(f"read the TLS files again; the certificate's serial number is {material.serial:x}")
            return material

    def _look(self) -> _Stamp:
        return tuple(_stamp(path) for path in (self._files.ca, self._files.cert, self._files.key))

    def _tell(self, text: str) -> None:
        if self._notice is not None:
            self._notice(text)


def server_credentials(reader: TlsReader) -> grpc.ServerCredentials:
    """Return credentials of a server that takes only clients with a certificate of the same CA.

    gRPC asks for the certificate at the begin of each connection, in a thread of its own; connections that are open
    go on as they are.
    """

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        material = reader.changed()
        return _configuration(material) if material is not None else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(reader.current()),
        fetch,  # type: ignore[arg-type]  # its stub forgets None, which says that nothing changed
        require_client_authentication=True,
    )


def channel_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Return credentials of a client with its own certificate."""
    return grpc.ssl_channel_credentials(
        root_certificates=material.ca, private_key=material.key, certificate_chain=material.cert
    )


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], root_certificates=material.ca)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(files: TlsFiles) -> TlsMaterial:
    # Imported here: most clients have no TLS files, and these bring a good part of what a command waits for.
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    ca, cert, key = (_read_pem(path) for path in (files.ca, files.cert, files.key))
    try:
        x509.load_pem_x509_certificates(ca)
    except ValueError as error:
        raise _unusable(files.ca, "holds no certificate in PEM") from error
    try:
        leaf = x509.load_pem_x509_certificates(cert)[0]
        public = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unusable(files.cert, "holds no certificate in PEM") from error
    try:
        own = load_pem_private_key(key, None).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(files.key, "holds no private key in PEM, or one under a password") from error
    if own != public:
        raise _unusable(files.key, f"does not belong to the certificate in {files.cert}")
    return TlsMaterial(ca=ca, cert=cert, key=key, serial=leaf.serial_number)


def _read_pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error


def _unusable(path: Path, why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the TLS file {path} {why}")
