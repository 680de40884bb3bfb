"""What a client's certificate says of its owner: one URI, a time, a fingerprint.

TLS has checked the chain already, when the connection was made. A connection may live longer than the certificate
that it began with, so the time is judged again at every call, and so is whether somebody revoked it.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from holdfast_core.model.access.policy import check_principal
from holdfast_core.model.errors import HoldfastError

_KEPT_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """What counts of one certificate.

    Attributes:
        principal: the URI of its subject alternative name; empty where it has none, several, or one that names nobody.
        why_nobody: why there is no principal, for people; empty where there is one.
        fingerprint: SHA-256 of its DER form.
        begins_unix_ms, ends_unix_ms: the time that it is valid in, both included.
    """

    principal: str
    why_nobody: str
    fingerprint: bytes
    begins_unix_ms: int
    ends_unix_ms: int


class Certificates:
    """Reads certificates, and keeps what it read of the last 1,024: each call of a connection brings the same one."""

    def __init__(self) -> None:
        self._read: dict[bytes, ClientCertificate] = {}

    def read(self, pem: bytes) -> ClientCertificate:
        """Return what a PEM certificate says; one that cannot be read names nobody and is valid never."""
        found = self._read.pop(pem, None)
        if found is None:
            found = _parse(pem)
            if len(self._read) >= _KEPT_MAX:
                del self._read[next(iter(self._read))]
        self._read[pem] = found
        return found


def _parse(pem: bytes) -> ClientCertificate:
    # Taken first and without parsing: what cannot be read can be revoked all the same.
    try:
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).digest()
    except ValueError:
        return ClientCertificate("", "it is no PEM", hashlib.sha256(pem).digest(), 0, 0)
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = _uris(certificate)
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        return ClientCertificate("", f"it cannot be read: {error}", fingerprint, 0, 0)
    principal, why_nobody = "", f"its subject alternative name has {len(names)} URIs, and one is needed"
    if len(names) == 1:
        try:
            principal, why_nobody = check_principal(names[0]), ""
        except HoldfastError as error:
            why_nobody = error.message
    return ClientCertificate(
        principal,
        why_nobody,
        fingerprint,
        int(certificate.not_valid_before_utc.timestamp() * 1000),
        int(certificate.not_valid_after_utc.timestamp() * 1000),
    )


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.UniformResourceIdentifier)
