"""A small certificate authority in a folder, for clusters whose owner has none: `holdfast pki init` and `pki issue`.

One authority signs all parties. Who a party is stands in the URI of its certificate, `spiffe://TRUST-DOMAIN/KIND/NAME`
(ADR 0075); host names are there for the peer's check alone. Keys are on the curve P-256, which every TLS library
speaks. The authority may sign no other authority, and its key is used for nothing but signing: keep the folder off the
cluster's machines.
"""

from __future__ import annotations

import datetime
import enum
import ipaddress
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_name
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.options import TlsFiles

TRUST_DOMAIN_DEFAULT: Final = "holdfast"
AUTHORITY_DAYS_DEFAULT: Final = 3650
CERTIFICATE_DAYS_DEFAULT: Final = 90

# Clocks of other machines may be behind this one's.
_BACKDATED_S: Final = 300
_DAY_S: Final = 86_400
_TRUST_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?\Z", re.ASCII)
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\Z", re.ASCII)
_AT_HOME: Final = ("localhost", "127.0.0.1", "::1")
# Common names hold 64 characters; nothing reads this one, it is for people.
_COMMON_NAME_CHARS_MAX: Final = 64


class Kind(enum.Enum):
    """What a certificate's owner is. The default policy gives `admin` every right, and `node` that of joining."""

    ADMIN = "admin"
    CLIENT = "client"
    NODE = "node"
    COORDINATOR = "coordinator"
    AGENT = "agent"

    @property
    def serves(self) -> bool:
        """Whether the owner listens itself; others' certificates cannot pose as a server."""
        return self in (Kind.NODE, Kind.COORDINATOR, Kind.AGENT)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made.

    Attributes:
        principal: its owner, as policies name it.
        folder: where ca.pem, cert.pem and key.pem are.
        ends_unix_ms: until when it is valid.
    """

    principal: str
    folder: Path
    ends_unix_ms: int

    @property
    def files(self) -> TlsFiles:
        """The three files."""
        return TlsFiles(ca=self.folder / "ca.pem", cert=self.folder / "cert.pem", key=self.folder / "key.pem")


def init_authority(
    folder: Path, *, clock: Clock, trust_domain: str = TRUST_DOMAIN_DEFAULT, days: int = AUTHORITY_DAYS_DEFAULT
) -> Path:
    """Make an authority: `ca.pem`, to be given to everybody, and `ca.key`, to be given to nobody; return the former.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a malformed trust domain; TARGET_EXISTS if an authority is there already;
            TARGET_UNWRITABLE.
    """
    if not _TRUST_DOMAIN.match(trust_domain):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{trust_domain!r} is no trust domain; use up to 255 lower-case letters, digits and . _ -",
        )
    certificate_file, key_file = folder / "ca.pem", folder / "ca.key"
    for path in (certificate_file, key_file):
        if path.exists():
            raise HoldfastError(
                ErrorCode.TARGET_EXISTS,
                f"{path} exists; all certificates under it would end with it: choose another folder",
            )
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"holdfast {trust_domain} authority")
    certificate = (
        _begun(name, name, key.public_key(), clock, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    _make_folder(folder)
    _write(key_file, _private_pem(key), private=True)
    _write(certificate_file, certificate.public_bytes(Encoding.PEM))
    return certificate_file


def issue(
    folder: Path,
    name: str,
    *,
    kind: Kind,
    clock: Clock,
    hosts: Sequence[str] = (),
    days: int = CERTIFICATE_DAYS_DEFAULT,
    output: Path | None = None,
    replace: bool = False,
) -> Issued:
    """Make a key and a certificate under the authority in `folder`.

    Args:
        folder: the authority's.
        name: the owner's name; with the kind it makes the principal.
        kind: what the owner is.
        clock: says when it begins, which is five minutes ago.
        hosts: names and IP addresses that the owner is reached by; those of its own machine are always among a
            server's.
        days: how long it is valid.
        output: folder to put the three files into; `folder`/`name` if None.
        replace: put them in the place of older ones; running services read them at their next connection.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a malformed name or host, or where the authority ends sooner; NOT_FOUND
            if there is no authority; TARGET_EXISTS without `replace`; TARGET_UNWRITABLE.
    """
    check_name(name, "certificate's name")
    authority, signing_key, bundle = _open_authority(folder)
    target = output if output is not None else folder / name
    if (target / "cert.pem").exists() and not replace:
        raise HoldfastError(
            ErrorCode.TARGET_EXISTS, f"{target} has a certificate; --replace puts a new one in its place"
        )
    principal = f"{_trust_domain_uri(authority, folder)}/{kind.value}/{name}"
    key = ec.generate_private_key(ec.SECP256R1())
    every_host = dict.fromkeys((*hosts, *(_AT_HOME if kind.serves else ())))
    alternatives = [x509.UniformResourceIdentifier(principal), *(_general_name(host) for host in every_host)]
    builder = _begun(_name(name), authority.subject, key.public_key(), clock, days)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_usages(kind)), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    if certificate.not_valid_after_utc > authority.not_valid_after_utc:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the authority itself ends on {authority.not_valid_after_utc:%Y-%m-%d}; give fewer --days or make another",
        )
    _make_folder(target)
    _write(target / "key.pem", _private_pem(key), private=True)
    _write(target / "ca.pem", bundle)
    _write(target / "cert.pem", certificate.public_bytes(Encoding.PEM))
    return Issued(principal, target, int(certificate.not_valid_after_utc.timestamp() * 1000))


def _open_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, bytes]:
    """Return the authority's certificate, its key, and ca.pem as it is: it may hold an older authority's too."""
    try:
        bundle, key_pem = (folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes()
    except OSError as error:
        raise HoldfastError(
            ErrorCode.NOT_FOUND,
            f"{error.filename} cannot be read: {error.strerror}; `holdfast pki init` makes an authority",
        ) from error
    try:
        key = load_pem_private_key(key_pem, None)
        certificates = x509.load_pem_x509_certificates(bundle)
    except (ValueError, TypeError) as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the authority in {folder} cannot be read: {error}") from error
    if isinstance(key, ec.EllipticCurvePrivateKey):
        public = _public_bytes(key.public_key())
        for certificate in certificates:
            if _public_bytes(certificate.public_key()) == public:
                return certificate, key, bundle
    raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{folder}/ca.key belongs to no certificate in {folder}/ca.pem")


def _trust_domain_uri(authority: x509.Certificate, folder: Path) -> str:
    with suppress(x509.ExtensionNotFound):
        extension = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        if len(uris) == 1:
            return uris[0]
    raise HoldfastError(
        ErrorCode.INVALID_ARGUMENT, f"{folder}/ca.pem names no trust domain; use an authority of `holdfast pki init`"
    )


def _begun(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, clock: Clock, days: int
) -> x509.CertificateBuilder:
    if not 1 <= days <= 36_500:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a certificate cannot be valid for {days} days; 1 to 36,500")
    now_s = clock.now_unix_ms() // 1000
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_s - _BACKDATED_S))
        .not_valid_after(_time(now_s + days * _DAY_S))
    )


def _time(unix_s: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_COMMON_NAME_CHARS_MAX])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        if _HOST.match(host):
            return x509.DNSName(host)
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"{host!r} is no host; give a name or an IP address without a port"
        ) from None


def _usages(kind: Kind) -> list[x509.ObjectIdentifier]:
    # Who serves is also a client: nodes of coordinators, coordinators of nodes.
    client = [ExtendedKeyUsageOID.CLIENT_AUTH]
    return [ExtendedKeyUsageOID.SERVER_AUTH, *client] if kind.serves else client


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_bytes(key: object) -> bytes:
    assert hasattr(key, "public_bytes")
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file under its name in one step; an older one stays until the new one is whole."""
    try:
        # Mode 0600 from the start, and never a file that somebody laid ready.
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o600 if private else 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> HoldfastError:
    return HoldfastError(ErrorCode.TARGET_UNWRITABLE, f"{path} cannot be written: {error.strerror}")
