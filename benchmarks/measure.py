"""Measuring a process and the disk: wall and CPU seconds, peak memory, bytes kept, and the cost of durable writing."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.spans import allocated_ranges

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SAMPLE_S: Final = 0.05
_WRITE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Measured:
    """What one command took.

    Attributes:
        started_s: `time.monotonic()` at its start, which all processes of a machine share.
        wall_s: from start to exit.
        cpu_s: user and system, the command's own children included.
        peak_rss_bytes: highest sum of the high-water marks of the command and its living descendants; what they share
            counts in each.
        output: what it printed on stdout.
    """

    started_s: float
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    output: str


class CommandFailed(RuntimeError):
    """A measured command exited with an error; the message ends with what it said."""


def run_measured(
    command: Sequence[str], *, scratch: Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Measured:
    """Run a command to its end and measure it; `scratch` takes its output files.

    Memory is read from the process while it runs: `ru_maxrss` would carry over what this process held when it forked.

    Raises:
        CommandFailed: it exited with anything but 0.
    """
    out_path, err_path = scratch / "stdout", scratch / "stderr"
    with open(out_path, "wb") as out, open(err_path, "wb") as err:
        everything = {**os.environ, **(environment or {})}
        start = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=everything,
        )
        peak = _peak_until_exit(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        said = err_path.read_text(errors="replace").strip()[-2000:]
        raise CommandFailed(f"{command[0]} exited with {child.returncode}: {said}")
    return Measured(
        started_s=start,
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=peak,
        output=out_path.read_text(errors="replace"),
    )


def _peak_until_exit(pid: int) -> int:
    """Wait until the process has exited (it stays unreaped) and return its and its descendants' peak in bytes."""
    peak = 0
    handle = os.pidfd_open(pid)
    try:
        while True:
            peak = max(peak, sum(_high_water_bytes(one) for one in _with_descendants(pid)))
            if select.select([handle], [], [], _SAMPLE_S)[0]:
                return peak
    finally:
        os.close(handle)


def _with_descendants(pid: int) -> list[int]:
    """A process and its living descendants, by what the kernel lists for its threads: cheap enough for every sample."""
    tree = [pid]
    for one in tree:
        for listed in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                tree += [int(child) for child in listed.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return tree


def _high_water_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def tree_cpu_s(pid: int) -> float:
    """CPU seconds that a process and all its living descendants have used so far."""
    return sum(_cpu_s(one) for one in process_tree(pid))


def process_tree(pid: int) -> list[int]:
    """A process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [pid]
    for one in tree:
        tree += children.get(one, [])
    return tree


def _cpu_s(pid: int) -> float:
    # proc(5): after the name in parentheses, user, system, children's user and children's system time are 12 to 15.
    return sum(int(ticks) for ticks in _stat(pid)[11:15]) / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields of a process after its name, or none if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def stored_bytes(folder: Path) -> int:
    """Bytes that the files below a folder occupy on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def settle() -> None:
    """Write everything that is dirty to the disk, so that no run pays for the one before it."""
    os.sync()


def durable_write_s(source: Path, folder: Path, *, total_bytes: int) -> float:
    """Seconds to write `total_bytes` of an image's data into one new file below `folder`, fdatasync included.

    What is written is real data from the page cache, in 1 MiB pieces, one after another: what a plain program reaches.
    """
    target = folder / "durable-write"
    settle()
    start = time.monotonic()
    with open(source, "rb", buffering=0) as data, open(target, "wb", buffering=0) as out:
        left = total_bytes
        while left:
            for begin, end in allocated_ranges(source):
                end = min(end, begin + left)
                left -= end - begin
                for at in range(begin, end, _WRITE_BYTES):
                    out.write(os.pread(data.fileno(), min(_WRITE_BYTES, end - at), at))
                if not left:
                    break
        os.fdatasync(out.fileno())
    seconds = time.monotonic() - start
    target.unlink()
    return seconds
