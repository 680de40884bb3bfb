"""Opening the sources of a VM's volumes for one session, and telling them how it ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from holdfast.results import VolumeSpec
from holdfast.sources.interface import BackupRun, GivenSource, TrackingSource, VolumeSource
from holdfast.sources.raw import RawFileSource
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.uris import parse_volume_uri

# Loaded when a volume needs them: most processes read raw files alone.
_EACH: Final = MappingProxyType(
    {
        "qcow2": ("holdfast.sources.qcow2", "open_qcow2"),
        "nbd": ("holdfast.sources.nbd", "open_nbd"),
        "nbd+unix": ("holdfast.sources.nbd", "open_nbd"),
        "memdiff": ("holdfast.sources.memory_diff", "open_memory_diff"),
    }
)
"""Where `open(spec, run)` of a scheme is; it returns one source."""

_TOGETHER: Final = MappingProxyType({"qmp": ("holdfast.sources.qmp", "open_qmp")})
"""Where `open(specs, run)` of a scheme is whose volumes are opened at one moment; it returns sources by name."""


class OpenedSources(Mapping[str, VolumeSource]):
    """The sources of one session by volume name. All of it blocks: for worker threads.

    Exactly one of `committed` and `abandoned` is called, then `close`.
    """

    def __init__(self, sources: Mapping[str, VolumeSource]) -> None:
        """Take open sources."""
        self._sources = dict(sources)

    def __getitem__(self, name: str) -> VolumeSource:
        """Return a volume's source."""
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the volumes' names."""
        return iter(self._sources)

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self._sources)

    def committed(self) -> tuple[str, ...]:
        """Let the change trackers go on from the new point; returns a sentence for each that could not.

        The point stands either way: a tracker that is lost costs the next backup a whole read, and nothing else.
        """
        return self._tell(lambda source: source.committed())

    def abandoned(self) -> tuple[str, ...]:
        """Let the change trackers go on from the parent; returns a sentence for each that could not."""
        return self._tell(lambda source: source.abandoned())

    def _tell(self, what: Callable[[TrackingSource], None]) -> tuple[str, ...]:
        lost = []
        for name, source in self._sources.items():
            if isinstance(source, TrackingSource):
                try:
                    what(source)
                except HoldfastError as error:
                    lost.append(f"volume {name}: its change tracker is lost, the next backup reads it all: {error}")
        return tuple(lost)

    def close(self) -> tuple[str, ...]:
        """Close all of them; returns a sentence for each that could not be closed."""
        failed = []
        for name, source in self._sources.items():
            try:
                source.close()
            except HoldfastError as error:
                failed.append(f"volume {name}: it could not be closed: {error}")
        return tuple(failed)


def open_sources(
    specs: Mapping[str, VolumeSpec], run: BackupRun, *, given: Mapping[str, GivenSource] = MappingProxyType({})
) -> OpenedSources:
    """Open the sources that a registration names, those of one machine at one moment; all of them or none.

    Args:
        specs: volumes by name.
        run: the session; its point does not exist yet.
        given: sources, or what opens them, by volume name, that take the place of what is registered.

    Raises:
        HoldfastError: SOURCE_UNREADABLE; INVALID_ARGUMENT if a URI is of no known kind, or does not fit the session;
            MISMATCH for a difference against another point than the parent.
    """
    opened = open_of(given)
    together: dict[str, dict[str, VolumeSpec]] = {}
    try:
        if unknown := sorted(given.keys() - specs.keys()):
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"the VM has no volume {unknown[0]}; a source is given for it"
            )
        for name, spec in specs.items():
            if name in given:
                brought = given[name]
                if callable(brought):
                    opened[name] = brought(run)
            else:
                scheme = parse_volume_uri(os.fspath(spec.uri)).scheme
                if scheme in _TOGETHER:
                    together.setdefault(scheme, {})[name] = spec
                else:
                    opened[name] = open_source(spec, run)
        # Last, because it stops guests for a moment, and leaves something behind in them if another volume fails.
        for scheme, group in together.items():
            opened.update(_opener(*_TOGETHER[scheme])(group, run))
    except BaseException:
        found = OpenedSources(opened)
        found.abandoned()
        found.close()
        raise
    return OpenedSources({name: opened[name] for name in specs})


def open_of(given: Mapping[str, GivenSource]) -> dict[str, VolumeSource]:
    """Return those that are open already."""
    return {name: source for name, source in given.items() if not callable(source)}


def open_source(spec: VolumeSpec, run: BackupRun | None = None) -> VolumeSource:
    """Open one source that does not need another to be opened with it; without `run` there is nothing to track.

    Raises:
        HoldfastError: as `open_sources`.
    """
    uri = parse_volume_uri(os.fspath(spec.uri))
    if uri.scheme == "file":
        return RawFileSource(Path(uri.path), live=spec.live)
    if uri.scheme not in _EACH:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the volume {spec.uri} is of a kind that this version cannot open"
        )
    opener = _opener(*_EACH[uri.scheme])
    source: VolumeSource = opener(spec, run or BackupRun(vm_id="", point_id="", parent_id=""))
    return source


def _opener(module: str, name: str) -> Callable[..., Any]:
    opener: Callable[..., Any] = getattr(import_module(module), name)
    return opener
