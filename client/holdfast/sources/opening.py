"""Which source a volume's URI names, and opening those of a VM for one session."""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.results import VolumeSpec
from holdfast.sources.interface import VolumeSource
from holdfast.sources.raw import RawFileSource
from holdfast_core.model.uris import parse_volume_uri


def open_source(spec: VolumeSpec) -> VolumeSource:
    """Open the source that a registration names.

    Raises:
        HoldfastError: SOURCE_UNREADABLE, or INVALID_ARGUMENT if the URI is of no known kind.
    """
    uri = parse_volume_uri(os.fspath(spec.uri))
    return RawFileSource(Path(uri.path), live=spec.live)
