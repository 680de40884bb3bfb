"""The files that `holdfast audit` writes and reads: exports, heads, proofs and public keys."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB

if TYPE_CHECKING:
    from holdfast_core.model.audit.export import Fields
    from holdfast_core.model.audit.proofs import Proven
    from holdfast_core.model.audit.verify import Verified
    from holdfast_proto.v1.audit_pb2 import SignedHead

_DOCUMENT_BYTES_MAX: Final = MIB
_PUBLIC_KEY = re.compile(r"[0-9a-fA-F]{64}\Z", re.ASCII)
# A proof that somebody has indented begins with a bare brace; an export's first line is always whole.
_PROOF = re.compile(rb'\{\s*\Z|\{\s*"type"\s*:\s*"(inclusion|consistency)"')


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines to a file that its owner alone can read; an older file is replaced in one step.

    Raises:
        HoldfastError: TARGET_UNWRITABLE if it cannot be written. An older file stays whole,
            after this and any other error.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for line in lines:
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise HoldfastError(
            ErrorCode.TARGET_UNWRITABLE, f"the file {path} cannot be written: {error.strerror}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def read_head(path: Path) -> tuple[SignedHead, list[bytes]]:
    """Return a head that `audit head` wrote, and the public keys beside it.

    Raises:
        HoldfastError: SOURCE_UNREADABLE, or CORRUPT if it is no head.
    """
    fields = _document(path)
    return fields.head(), list(fields.keys().values())


def read_keys(texts: Sequence[str]) -> list[bytes]:
    """Return public keys that are given as 64 hexadecimal digits, files of such, or files of heads with keys.

    Raises:
        HoldfastError: SOURCE_UNREADABLE for a file that cannot be read, CORRUPT for one that holds no key.
    """
    found: list[bytes] = []
    for text in texts:
        if _PUBLIC_KEY.match(text):
            found.append(bytes.fromhex(text))
            continue
        held = _read(Path(text)).decode("ascii", errors="replace").strip()
        found += [bytes.fromhex(held)] if _PUBLIC_KEY.match(held) else _document(Path(text)).keys().values()
    return found


def verify_file(path: Path, *, trusted: Sequence[bytes], known_head: SignedHead | None) -> Verified | Proven:
    """Verify an export or a proof (see `verify_export` and `verify_proof`).

    Raises:
        HoldfastError: SOURCE_UNREADABLE, or what these say.
    """
    from holdfast_core.model.audit.proofs import verify_proof
    from holdfast_core.model.audit.verify import verify_export

    with _opened(path) as file:
        is_proof = _PROOF.match(file.readline(_DOCUMENT_BYTES_MAX)) is not None
        file.seek(0)
        if is_proof:
            return verify_proof(_bounded(file, path), trusted=trusted, known_head=known_head)
        return verify_export(file, trusted=trusted, known_head=known_head)


def _document(path: Path) -> Fields:
    from holdfast_core.model.audit.export import HEAD, Fields

    return Fields.of(_read(path), HEAD)


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        return _bounded(file, path)


def _bounded(file: BinaryIO, path: Path) -> bytes:
    read = file.read(_DOCUMENT_BYTES_MAX + 1)
    if len(read) > _DOCUMENT_BYTES_MAX:
        raise HoldfastError(ErrorCode.CORRUPT, f"the file {path} is too long to be a key, a head or a proof")
    return read


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the file {path} cannot be read: {error.strerror}") from error
