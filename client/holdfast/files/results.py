"""What the calls about files take and return: frozen values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_core.model.files.patterns import os_text
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry


class FileKind(enum.Enum):
    """What a file is."""

    REGULAR = "file"
    DIRECTORY = "directory"
    SYMBOLIC_LINK = "symbolic link"
    HARD_LINK = "hard link"
    FIFO = "fifo"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"


_KINDS: Final = {
    files_pb2.FILE_KIND_REGULAR: FileKind.REGULAR,
    files_pb2.FILE_KIND_DIRECTORY: FileKind.DIRECTORY,
    files_pb2.FILE_KIND_SYMBOLIC_LINK: FileKind.SYMBOLIC_LINK,
    files_pb2.FILE_KIND_HARD_LINK: FileKind.HARD_LINK,
    files_pb2.FILE_KIND_FIFO: FileKind.FIFO,
    files_pb2.FILE_KIND_CHARACTER_DEVICE: FileKind.CHARACTER_DEVICE,
    files_pb2.FILE_KIND_BLOCK_DEVICE: FileKind.BLOCK_DEVICE,
}


@dataclass(frozen=True, slots=True)
class PointFiles:
    """Files inside a volume of a recovery point, as a source.

    Attributes:
        point_id: a snapshot or a backup.
        volume: name of the volume; "" is the first.
        partition: number of the partition in the volume's table; 0 finds the only ext2, ext3 or ext4 file system.
        root: directory of the file system that counts as the root of what is kept.
    """

    point_id: str
    volume: str = ""
    partition: int = 0
    root: str = "/"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file in a stored set or in a recovery point.

    Attributes:
        path: below the root, without a slash before it; bytes that are no UTF-8 stand as lone surrogates, as
            `os.fsdecode` makes them.
        mode: permission bits, with set-user-id, set-group-id and sticky.
        mtime_ns: time of the last change of the content, nanoseconds since 1970.
        size_bytes: of a regular file, holes counted.
        target: text of a symbolic link; the path that a hard link is another name of.
        device: major and minor number of a device.
    """

    path: str
    kind: FileKind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    target: str = ""
    device: tuple[int, int] = (0, 0)


def file_info(entry: FileEntry) -> FileInfo:
    """Return what an entry says, for users."""
    return FileInfo(
        path=os_text(entry.path),
        kind=_KINDS[entry.kind],
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_s * 10**9 + entry.mtime_ns,
        size_bytes=entry.size_bytes,
        target=os_text(entry.target),
        device=(entry.device_major, entry.device_minor),
    )


@dataclass(frozen=True, slots=True)
class RetrievedFiles:
    """What was retrieved.

    Attributes:
        target: the directory that it is in.
        file_count: entries that were written, directories among them.
        data_bytes: content that was written, holes not counted.
        left_out: paths of devices, which only root may make.
    """

    target: Path
    file_count: int
    data_bytes: int
    left_out: tuple[str, ...]
