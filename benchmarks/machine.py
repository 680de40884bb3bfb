"""What the figures were measured on: processor, cores, versions. No names of hosts or places."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.contenders.borg import borg_version
from benchmarks.contenders.restic import restic_version

_PACKAGES = ("holdfast", "grpcio", "protobuf", "blake3", "cryptography", "lz4", "zstandard")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and what runs on it; a peer that is not installed has no version here."""

    processor: str
    cores: int
    memory_bytes: int
    system: str
    versions: dict[str, str]


def this_machine() -> Machine:
    """Look at this machine."""
    versions = {name: version(name) for name in _PACKAGES}
    versions["python"] = platform.python_version()
    for name, found in (("restic", restic_version()), ("borg", borg_version())):
        if found is not None:
            versions[name] = found.removeprefix(f"{name} ")
    distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown distribution")
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{distribution}, Linux {platform.release().partition('-')[0]}",
        versions=versions,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.machine()
