"""Where volumes are read from: the interface, and what implements it."""

from holdfast.sources.interface import (
    BackupRun,
    DifferenceSource,
    GivenSource,
    SharedSource,
    SourceOpener,
    TrackingSource,
    VolumeSource,
)
from holdfast.sources.memory_diff import MemoryDiffSource
from holdfast.sources.opening import OpenedSources, open_source, open_sources
from holdfast.sources.raw import RawFileSource

__all__ = [
    "BackupRun",
    "DifferenceSource",
    "GivenSource",
    "MemoryDiffSource",
    "OpenedSources",
    "RawFileSource",
    "SharedSource",
    "SourceOpener",
    "TrackingSource",
    "VolumeSource",
    "open_source",
    "open_sources",
]
