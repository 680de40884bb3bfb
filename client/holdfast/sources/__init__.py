"""Where volumes are read from: the interface, and what implements it."""

from holdfast.sources.interface import BackupRun, DifferenceSource, SharedSource, TrackingSource, VolumeSource
from holdfast.sources.opening import open_source
from holdfast.sources.raw import RawFileSource

__all__ = [
    "BackupRun",
    "DifferenceSource",
    "RawFileSource",
    "SharedSource",
    "TrackingSource",
    "VolumeSource",
    "open_source",
]
