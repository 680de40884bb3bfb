"""Compression: text as applications leave it, taken from this machine, stored as application data.

Sources, JSON, documentation and package lists are files of installed packages as they are. Of CSV and logs a machine
without services has little: the CSV table and the larger part of the log are written here, a line for each packaged
file with its real name, time, size and checksum, in the formats of a spreadsheet's export and of a system's log; the
log begins with what package managers have really logged.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from benchmarks.packages import Package
from benchmarks.reduction.cluster import WrongBytes, fresh_cluster, last_stats, on_disk_bytes
from benchmarks.reduction.rows import TEXT, Row, Share
from holdfast.results import TransferStats

MB: Final = 1_000_000
_SOURCES: Final = frozenset({".py", ".h", ".hpp", ".c", ".pm", ".pl", ".sh", ".js", ".vim", ".rb"})
_DOCUMENTS: Final = frozenset({".txt", ".md", ".html", ".rst", ".xml"})
_LOGS: Final = ("dpkg.log*", "apt/*.log", "alternatives.log*", "bootstrap.log", "syslog", "messages")
_PACKED: Final = frozenset({".gz", ".xz", ".bz2", ".zst"})

Kinds = Mapping[str, Callable[[], Iterator[bytes]]]
"""Content by its kind, in pieces."""


def measure_texts(kinds: Kinds, *, each_bytes: int, work: Path, say: Callable[[str], None]) -> Row:
    """Store up to `each_bytes` of every kind by `persist_stream`.

    Raises:
        benchmarks.reduction.cluster.WrongBytes: an object was not retrieved as it was stored.
    """
    work.mkdir()
    found: dict[str, TransferStats] = {}
    with fresh_cluster(work / "cluster") as manager:
        for kind, content in kinds.items():
            pieces = list(cut(content(), each_bytes))
            storage_id = manager.persist_stream(kind.replace(" ", "-"), iter(pieces))
            found[kind] = last_stats(manager)
            if manager.retrieve_application_data(storage_id) != b"".join(pieces):
                raise WrongBytes(f"{kind} were not retrieved as they were stored")
            say(f"  {kind}: {found[kind].logical_bytes / 1e6:.1f} MB")
    return texts_row(found, kept_bytes=on_disk_bytes(work / "cluster"))


def texts_row(found: Mapping[str, TransferStats], *, kept_bytes: int) -> Row:
    """Return the row of what was stored by kind; what was deduplicated counts on neither side."""
    return Row(
        name="compression, text application data",
        goal=TEXT,
        workload="application data of this machine by `persist_stream`: " + ", ".join(found),
        formula="1 - sealed bytes newly stored / their plaintext, index included",
        figure=Share(
            "text",
            sum(stats.stored_bytes for stats in found.values()),
            sum(stats.stored_plain_bytes for stats in found.values()),
        ),
        beside=tuple(Share(kind, stats.stored_bytes, stats.stored_plain_bytes) for kind, stats in found.items()),
        facts={
            "logical bytes": sum(stats.logical_bytes for stats in found.values()),
            "deduplicated bytes": sum(stats.deduplicated_bytes for stats in found.values()),
            "bytes on the node's disk": kept_bytes,
        },
    )


def machine_texts(packages: Sequence[Package], *, info: Path, logs: Path) -> Kinds:
    """Return what there is on this machine, by kind; `info` is dpkg's folder, `logs` the system's."""
    return {
        "logs": lambda: chain(_files(_logged(logs)), _log_lines(packages)),
        "JSON": lambda: _files(_with_suffix(packages, frozenset({".json"}))),
        "CSV": lambda: _table(packages, _checksums(info)),
        "source text": lambda: _files(_with_suffix(packages, _SOURCES)),
        "documentation": lambda: _files(_with_suffix(packages, _DOCUMENTS)),
        "package lists": lambda: _files(sorted([*info.glob("*.list"), info.parent / "status"])),
    }


def cut(pieces: Iterable[bytes], size_bytes: int) -> Iterator[bytes]:
    """Yield pieces until they are `size_bytes` together."""
    left = size_bytes
    for piece in pieces:
        if left <= 0:
            return
        yield piece[:left]
        left -= len(piece)


def _with_suffix(packages: Sequence[Package], suffixes: frozenset[str]) -> Iterator[Path]:
    for package in packages:
        yield from (path for path in package.paths if path.suffix in suffixes and not path.is_symlink())


def _logged(logs: Path) -> list[Path]:
    return sorted(path for pattern in _LOGS for path in logs.glob(pattern) if path.suffix not in _PACKED)


def _files(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        try:
            yield path.read_bytes()
        except (FileNotFoundError, PermissionError):  # a log that only root may read
            continue


def _checksums(info: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(info.glob("*.md5sums")):
        for line in path.read_text(errors="replace").splitlines():
            checksum, _, name = line.partition("  ")
            sums[f"/{name}"] = checksum
    return sums


def _table(packages: Sequence[Package], sums: Mapping[str, str]) -> Iterator[bytes]:
    yield b"package,path,bytes,modified,mode,md5\n"
    for package in packages:
        for path in package.paths:
            status = path.lstat()
            yield (
                f"{package.name},{path},{status.st_size},{_clock(status.st_mtime)},{status.st_mode & 0o7777:o},"
                f"{sums.get(str(path), '')}\n"
            ).encode()


def _log_lines(packages: Sequence[Package]) -> Iterator[bytes]:
    for number, package in enumerate(packages):
        for path in package.paths:
            status = path.lstat()
            yield (
                f"{_clock(status.st_mtime)} host dpkg[{1000 + number}]: {package.name}: unpacked {path}, "
                f"{status.st_size} bytes, inode {status.st_ino}\n"
            ).encode()


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
