"""How a set of files is stored: one object of content, manifest and trailer (docs/formats.md, file sets).

The content comes first, so that a set is written in one pass; the trailer at the very end says where the manifest
begins. Content is the data of the regular files in the order of their entries, without holes. A decoder takes only
what an encoder could have made: an entry cannot name a place outside of the set, nor lie below something that is no
directory of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import zstandard
from google.protobuf.message import DecodeError

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import os_text
from holdfast_core.model.limits import KIB, MIB
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

HOLE_BYTES: Final = 4 * KIB
"""Zeros are left out where they fill a unit of this size, counted from the file's beginning."""

FILES_MAX: Final = 1_000_000
MANIFEST_BYTES_MAX: Final = 512 * MIB
PATH_BYTES_MAX: Final = 4096
NAME_BYTES_MAX: Final = 255
TARGET_BYTES_MAX: Final = 4096
SIZE_BYTES_MAX: Final = 2**63 - 1

TRAILER_BYTES: Final = 32
_TRAILER: Final = struct.Struct("<4sIQQQ")
_MAGIC: Final = b"HFFS"
_VERSION: Final = 1
_LEVEL: Final = 3

_REGULAR: Final = files_pb2.FILE_KIND_REGULAR
_DIRECTORY: Final = files_pb2.FILE_KIND_DIRECTORY
_SYMBOLIC_LINK: Final = files_pb2.FILE_KIND_SYMBOLIC_LINK
_HARD_LINK: Final = files_pb2.FILE_KIND_HARD_LINK
_DEVICES: Final = frozenset({files_pb2.FILE_KIND_CHARACTER_DEVICE, files_pb2.FILE_KIND_BLOCK_DEVICE})
_KINDS: Final = frozenset({_REGULAR, _DIRECTORY, _SYMBOLIC_LINK, _HARD_LINK, files_pb2.FILE_KIND_FIFO, *_DEVICES})


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last bytes of a set.

    Attributes:
        content_bytes: length of the content, which begins at 0.
        manifest_bytes: length of the compressed manifest, which follows it.
        manifest_plain_bytes: its length when it is decompressed.
    """

    content_bytes: int
    manifest_bytes: int
    manifest_plain_bytes: int

    def encode(self) -> bytes:
        """Return the 32 bytes."""
        return _TRAILER.pack(_MAGIC, _VERSION, self.content_bytes, self.manifest_bytes, self.manifest_plain_bytes)


def decode_trailer(raw: bytes, *, object_bytes: int) -> Trailer:
    """Return the trailer of an object of `object_bytes`.

    Raises:
        HoldfastError: CORRUPT if the object is no set of files.
    """
    if len(raw) != TRAILER_BYTES or raw[:4] != _MAGIC:
        raise _corrupt("it does not end in a trailer")
    _, version, content_bytes, manifest_bytes, manifest_plain_bytes = _TRAILER.unpack(raw)
    if version != _VERSION:
        raise _corrupt(f"its version is {version}; this release reads {_VERSION}")
    if content_bytes + manifest_bytes + TRAILER_BYTES != object_bytes:
        raise _corrupt("its parts do not add up to its size")
    if manifest_plain_bytes > MANIFEST_BYTES_MAX:
        raise _corrupt(f"its manifest is larger than {MANIFEST_BYTES_MAX} bytes")
    return Trailer(content_bytes, manifest_bytes, manifest_plain_bytes)


def order_key(path: bytes) -> list[bytes]:
    """Return what entries are ordered by: the names of the path, one after another."""
    return path.split(b"/")


def data_bytes(entry: FileEntry) -> int:
    """Return how much content an entry has, holes not counted."""
    return sum(extent.length for extent in entry.extents)


def encode_end(entries: Sequence[FileEntry], *, content_bytes: int) -> bytes:
    """Return what follows the content: the manifest, compressed, and the trailer.

    The entries are in order and keep the rules of `check_entries`.

    Raises:
        HoldfastError: LIMIT_EXCEEDED if there are too many of them.
    """
    plain = files_pb2.FileSetManifest(entries=entries).SerializeToString(deterministic=True)
    if len(plain) > MANIFEST_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"the list of the files has {len(plain)} bytes; {MANIFEST_BYTES_MAX} are allowed. Make several sets",
        )
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(plain)
    return packed + Trailer(content_bytes, len(packed), len(plain)).encode()


def decode_manifest(packed: bytes, trailer: Trailer) -> list[FileEntry]:
    """Return the entries of a set, each of them checked.

    Raises:
        HoldfastError: CORRUPT if these are not the bytes of a manifest that fits the trailer.
    """
    try:
        declared = zstandard.frame_content_size(packed)
        if declared != trailer.manifest_plain_bytes:
            raise _corrupt("its manifest has another size than its trailer says")
        plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=trailer.manifest_plain_bytes)
        manifest = files_pb2.FileSetManifest.FromString(plain)
    except (zstandard.ZstdError, DecodeError) as error:
        raise _corrupt("its manifest cannot be decoded") from error
    if len(plain) != trailer.manifest_plain_bytes:
        raise _corrupt("its manifest has another size than its trailer says")
    entries = list(manifest.entries)
    check_entries(entries)
    if sum(map(data_bytes, entries)) != trailer.content_bytes:
        raise _corrupt("its files do not add up to its content")
    return entries


def check_entries(entries: Iterable[FileEntry]) -> None:
    """Check that entries are in order, that each lies in a directory before it, and that hard links lead to files.

    Raises:
        HoldfastError: CORRUPT with the entry that is wrong.
    """
    before: list[bytes] = []
    open_directories: set[bytes] = {b""}
    regular: set[bytes] = set()
    for count, entry in enumerate(entries, 1):
        if count > FILES_MAX:
            raise _corrupt(f"it has more than {FILES_MAX} files")
        check_entry(entry)
        key = order_key(entry.path)
        if key <= before:
            raise _wrong(entry, "is not behind the one before it")
        before = key
        if entry.path.rpartition(b"/")[0] not in open_directories:
            raise _wrong(entry, "lies in no directory of the set")
        if entry.kind == _DIRECTORY:
            open_directories.add(entry.path)
        elif entry.kind == _REGULAR:
            regular.add(entry.path)
        elif entry.kind == _HARD_LINK and entry.target not in regular:
            raise _wrong(entry, "is another name of a file that does not come before it")


def check_entry(entry: FileEntry) -> None:
    """Check an entry by itself.

    Raises:
        HoldfastError: CORRUPT if no file could be so.
    """
    check_path(entry.path)
    if entry.kind not in _KINDS:
        raise _wrong(entry, f"is of no known kind ({entry.kind})")
    if entry.mode > 0o7777 or entry.mtime_ns >= 10**9 or not -(2**60) < entry.mtime_s < 2**60:
        raise _wrong(entry, "has a mode or a time that no file has")
    linked = entry.kind in (_SYMBOLIC_LINK, _HARD_LINK)
    if bool(entry.target) != linked or len(entry.target) > TARGET_BYTES_MAX or b"\0" in entry.target:
        raise _wrong(entry, "has a target that does not fit what it is")
    if (entry.device_major or entry.device_minor) and entry.kind not in _DEVICES:
        raise _wrong(entry, "is no device and has a device's numbers")
    if entry.kind != _REGULAR and (entry.size_bytes or entry.extents):
        raise _wrong(entry, "has content, which only a regular file has")
    end = 0
    for extent in entry.extents:
        if not extent.length or extent.offset < end or (end and extent.offset == end):
            raise _wrong(entry, "has extents that are empty or not apart")
        end = extent.offset + extent.length
    if end > entry.size_bytes or entry.size_bytes > SIZE_BYTES_MAX:
        raise _wrong(entry, "has content behind its end")


def check_path(path: bytes) -> None:
    """Check that a path stays below the root of its set.

    Raises:
        HoldfastError: CORRUPT if it is empty, absolute, too long or has an empty name, `.`, `..` or a zero byte in it.
    """
    names = path.split(b"/")
    if (
        len(path) > PATH_BYTES_MAX
        or b"\0" in path
        or any(name in (b"", b".", b"..") or len(name) > NAME_BYTES_MAX for name in names)
    ):
        raise _corrupt(f"the path {os_text(path[:200])!r} is not one that a file below a directory can have")


def _wrong(entry: FileEntry, why: str) -> HoldfastError:
    return _corrupt(f"the entry {os_text(entry.path[:200])!r} {why}")


def _corrupt(why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.CORRUPT, f"this is no set of files as Holdfast writes them: {why}")
