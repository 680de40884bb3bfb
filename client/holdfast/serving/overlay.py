"""The directory of an overlay: what a guest wrote over a recovery point, and what has been fetched for it.

DIR/overlay.json     which point it lies over, and the volumes; written once
DIR/lock             held while somebody serves or saves it
DIR/NAME.written     what the guest wrote, with NAME.written.map (units of 4 KiB)
DIR/NAME.fetched     blocks of the point that a hydrate has brought, with NAME.fetched.map (units of the point's blocks)

The two files of a volume are never mixed: what is written counts over what is fetched, so that a write that was cut off
can never pass for the point's content, nor the other way round.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.serving.local_file import LocalFile, unusable
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id, check_name, check_volume_name
from holdfast_proto.v1.records_pb2 import PointRecord

GRAIN_BYTES: Final = 4096
"""What the written map counts: a file system's usual block, so that most writes need nothing of the point."""

_FORMAT: Final = 1
_MANIFEST: Final = "overlay.json"
_MANIFEST_BYTES_MAX: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class OverlayVolume:
    """A volume that an overlay lies over: its name, its size and the size of its blocks in bytes."""

    name: str
    size_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an overlay belongs to.

    Attributes:
        vm_id: the VM.
        point_id: the point that it lies over.
        volumes: its volumes, in the point's order.
    """

    vm_id: str
    point_id: str
    volumes: tuple[OverlayVolume, ...]

    @classmethod
    def of(cls, point: PointRecord) -> Manifest:
        """Return the manifest of an overlay over a point."""
        volumes = tuple(OverlayVolume(each.name, each.size_bytes, each.block_bytes) for each in point.volumes)
        return cls(point.vm_id, point.point_id, volumes)

    def to_json(self) -> str:
        """Return its text."""
        volumes = [
            {"name": each.name, "size_bytes": each.size_bytes, "block_bytes": each.block_bytes} for each in self.volumes
        ]
        fields = {
            "format": _FORMAT,
            "vm_id": self.vm_id,
            "point_id": self.point_id,
            "volumes": volumes,
        }
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Return what `to_json` made.

        Raises:
            HoldfastError: CORRUPT if it is something else.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != _FORMAT:
                raise ValueError("another format")
            volumes = tuple(_volume(each) for each in fields["volumes"])
            return cls(
                check_name(fields["vm_id"], "VM name"),
                check_id(fields["point_id"], "point id"),
                volumes,
            )
        except (ValueError, KeyError, TypeError, HoldfastError) as error:
            raise HoldfastError(
                ErrorCode.CORRUPT, f"{where} does not describe an overlay that this version can use: {error}"
            ) from error


def _volume(fields: Mapping[str, Any]) -> OverlayVolume:
    size_bytes, block_bytes = fields["size_bytes"], fields["block_bytes"]
    if not isinstance(size_bytes, int) or not isinstance(block_bytes, int) or size_bytes < 0 or block_bytes < 1:
        raise ValueError("sizes that are none")
    return OverlayVolume(check_volume_name(fields["name"]), size_bytes, block_bytes)


@dataclass(frozen=True, slots=True)
class VolumeFiles:
    """The two local files of a volume."""

    written: LocalFile
    fetched: LocalFile


class Overlay:
    """An overlay that is open and locked. A context manager, or call `close`.

    Attributes:
        directory: where it is.
        manifest: what it belongs to.
        files: its files, by volume.
    """

    def __init__(self, directory: Path, manifest: Manifest | None) -> None:
        """Open what is there, or make it for `manifest`.

        Raises:
            HoldfastError: BUSY if somebody uses it; MISMATCH if it lies over another point; NOT_FOUND if nothing is
                there and `manifest` is None; TARGET_EXISTS if other things are; TARGET_UNWRITABLE; CORRUPT.
        """
        self.directory = directory
        self.files: dict[str, VolumeFiles] = {}
        self._lock = -1
        try:
            if manifest is None and not (directory / _MANIFEST).exists():
                raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no overlay in {directory}")
            self._take_lock()
            self.manifest = self._described(manifest)
            for volume in self.manifest.volumes:
                written = self._file(volume, "written", GRAIN_BYTES)
                self.files[volume.name] = VolumeFiles(written, self._file(volume, "fetched", volume.block_bytes))
        except OSError as error:
            self.close()
            raise unusable(directory, error) from error
        except HoldfastError:
            self.close()
            raise

    def __enter__(self) -> Overlay:
        """Return the overlay."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    def _take_lock(self) -> None:
        known = {_MANIFEST, f"{_MANIFEST}.partial", "lock"}
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.directory / _MANIFEST).exists() and {entry.name for entry in self.directory.iterdir()} - known:
            raise HoldfastError(
                ErrorCode.TARGET_EXISTS, f"{self.directory} holds other things than an overlay; name another directory"
            )
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HoldfastError(
                ErrorCode.BUSY, f"the overlay in {self.directory} is in use by another process; stop that one first"
            ) from None

    def _described(self, wanted: Manifest | None) -> Manifest:
        path = self.directory / _MANIFEST
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as stream:
                found = Manifest.from_json(stream.read(_MANIFEST_BYTES_MAX), path)
            if wanted is not None and (found.point_id, found.volumes) != (wanted.point_id, wanted.volumes):
                raise HoldfastError(
                    ErrorCode.MISMATCH,
                    f"the overlay in {self.directory} lies over point {found.point_id} and fits no other; "
                    f"name another directory, or discard it",
                )
            return found
        assert wanted is not None, "an overlay without a manifest is made for one"
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(wanted.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
        self._sync_directory()
        return wanted

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _file(self, volume: OverlayVolume, kind: str, unit_bytes: int) -> LocalFile:
        return LocalFile(self.directory / f"{volume.name}.{kind}", size_bytes=volume.size_bytes, unit_bytes=unit_bytes)

    def written_bytes(self) -> dict[str, int]:
        """Return how many bytes were written over each volume, in whole grains."""
        return {
            name: min(files.written.map.held * GRAIN_BYTES, files.written.size_bytes)
            for name, files in self.files.items()
        }

    def fetched_bytes(self) -> dict[str, int]:
        """Return how many bytes of each volume have been fetched, holes counted too."""
        return {
            name: min(files.fetched.map.held * files.fetched.unit_bytes, files.fetched.size_bytes)
            for name, files in self.files.items()
        }

    def discard(self) -> None:
        """Remove the directory with all that was written, and close.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        try:
            # Without its manifest it is no overlay any more, whatever happens to the rest.
            (self.directory / _MANIFEST).unlink()
            shutil.rmtree(self.directory)
        except OSError as error:
            raise unusable(self.directory, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close all files and let others use it; may be called more than once."""
        for files in self.files.values():
            files.written.close()
            files.fetched.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
