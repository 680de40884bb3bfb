"""qcow2 images that no VM runs on, read through a private `qemu-nbd`, with a persistent dirty bitmap as change tracker.

A bitmap `holdfast-POINT` in the image records what is written since that point. The one of the new point is added
*before* anything is read, while the parent's still records: whatever is written later is in it, whatever was written
earlier is read. So nothing has to happen at one exact moment, and each end leaves a tracker that is right:

* committed: the new bitmap stays, and all others of ours go;
* abandoned: the new one goes, and the parent's has recorded on;
* this process was killed: both stay; the next backup uses its parent's, whichever that is, and clears up the rest.

What changes in a backing file or beside QEMU is in no bitmap: the sample of an incremental backup is there for that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from holdfast.descriptors import unreadable, volume_changed
from holdfast.results import Consistency, VolumeSpec
from holdfast.sources.identity import FileIdentity, rested_identity
from holdfast.sources.interface import BackupRun
from holdfast.sources.nbd import BITMAP_PREFIX, ExportedVolume, ExportReader, bitmap_name
from holdfast.sources.qemu_tools import PrivateExport, change_bitmap, image_chain
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.uris import parse_volume_uri

_IN_USE: Final = "in-use"
_RECORDS: Final = "auto"


class Qcow2Source(ExportedVolume):
    """A qcow2 image at rest, with all that it is backed by."""

    def __init__(self, path: str, run: BackupRun, *, tracking: bool = True) -> None:
        """Open it; with `tracking` and a session, a dirty bitmap of the new point is added to the image.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if it is missing, in use, encrypted, marked as corrupt or no qcow2 image,
                or if QEMU's tools are not installed; LIMIT_EXCEEDED.
        """
        self._path = path
        chain = image_chain(path)
        _check_readable(path, chain[0])
        self._bitmaps = _bitmaps_of(chain[0])
        self._parent_id = run.parent_id
        self._why_unknown = self._unusable(bitmap_name(run.parent_id)) if tracking and run.parent_id else ""
        self._added = bitmap_name(run.point_id) if tracking and run.point_id else ""
        self._not_added: HoldfastError | None = None
        if self._added:
            self._add()
        try:
            known = tracking and run.parent_id and not self._why_unknown
            self._connect(bitmap_name(run.parent_id) if known else "")
            try:
                # From here on QEMU's lock keeps other machines away; whoever ignores locks shows in the time stamps.
                self._begin = {file: rested_identity(partial(_identity, file)) for file in _files_of(path, chain)}
            except BaseException:
                self._release()
                raise
        except BaseException:
            self._remove(self._added)
            raise

    def _connect(self, bitmap: str) -> None:
        self._export = PrivateExport(self._path, bitmap=bitmap)
        try:
            self._reader = ExportReader(self._export.endpoint, bitmap=bitmap)
        except HoldfastError as error:
            failed = self._export.failed(error)
            self._export.close()
            raise failed from error
        except BaseException:
            self._export.close()
            raise

    def why_unknown(self) -> str:
        """Return why the parent's bitmap cannot be used; empty where tracking is off."""
        return self._why_unknown

    def finish(self) -> Consistency:
        """Compare the image and the files behind it with themselves at the beginning.

        Raises:
            HoldfastError: VOLUME_CHANGED if one of them was written, resized or replaced.
        """
        for file, begin in self._begin.items():
            if _identity(file) != begin:
                raise volume_changed(self._path)
        return Consistency.OFFLINE

    def committed(self) -> None:
        """Keep the new point's bitmap and remove all others of ours.

        Raises:
            HoldfastError: the new bitmap could not be added when the image was opened.
        """
        self._release()
        for name in self._bitmaps:
            if self._added and name.startswith(BITMAP_PREFIX) and name != self._added:
                self._remove(name)
        if self._not_added is not None:
            raise self._not_added

    def abandoned(self) -> None:
        """Remove the new point's bitmap; the parent's has recorded on."""
        self._release()
        self._remove(self._added)

    def close(self) -> None:
        """End what reads the image; may be called more than once."""
        self._release()

    def _unusable(self, name: str) -> str:
        """Return why a bitmap of the image cannot be believed; empty if it can."""
        flags = self._bitmaps.get(name)
        if flags is None:
            ours = sorted(other for other in self._bitmaps if other.startswith(BITMAP_PREFIX))
            return f"the image has the bitmap {ours[0]} and not {name}" if ours else f"the image has no bitmap {name}"
        if _IN_USE in flags:
            return f"the bitmap {name} is inconsistent: QEMU ended without closing the image"
        return "" if _RECORDS in flags else f"the bitmap {name} was disabled"

    def _add(self) -> None:
        try:
            change_bitmap(self._path, "--add", self._added)
        except HoldfastError as error:
            # Reading goes on: an image that may not be written can be backed up, only not tracked.
            self._added = ""
            self._not_added = HoldfastError(
                error.code, f"{error.message}; tracking=off in the volume's URI leaves the image as it is"
            )

    def _remove(self, name: str) -> None:
        """Remove a bitmap that is of no more use; if it stays, a later backup removes it."""
        if name:
            try:
                change_bitmap(self._path, "--remove", name)
            except HoldfastError:
                return

    def _release(self) -> None:
        self._reader.close()
        self._export.close()


def open_qcow2(spec: VolumeSpec, run: BackupRun) -> Qcow2Source:
    """Open the source of a `qcow2:` URI.

    Raises:
        HoldfastError: SOURCE_UNREADABLE; INVALID_ARGUMENT; LIMIT_EXCEEDED.
    """
    uri = parse_volume_uri(os.fspath(spec.uri))
    return Qcow2Source(uri.path, run, tracking=uri.parameter("tracking") != "off")


def _check_readable(path: str, info: dict[str, Any]) -> None:
    trouble = ""
    if info.get("encrypted"):
        trouble = "it is encrypted; give its plain content by a qemu-nbd of your own as nbd+unix:"
    elif _specific(info).get("corrupt"):
        trouble = "it is marked as corrupt; qemu-img check -r repairs it"
    if trouble:
        raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the volume {path} cannot be read: {trouble}")


def _bitmaps_of(info: dict[str, Any]) -> dict[str, frozenset[str]]:
    """Return the flags of an image's bitmaps by name."""
    return {bitmap["name"]: frozenset(bitmap["flags"]) for bitmap in _specific(info).get("bitmaps", ())}


def _files_of(path: str, chain: Sequence[dict[str, Any]]) -> list[Path]:
    """Return the local files that content comes from: the image, what it is backed by, and data kept outside of it."""
    files = [Path(path)]
    for info in chain:
        folder = files[-1].parent
        backing, data = info.get("full-backing-filename"), _specific(info).get("data-file")
        if data:
            files.insert(0, folder / data)
        if backing and Path(backing).exists():
            files.append(Path(backing))
    return files


def _specific(info: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = info.get("format-specific", {}).get("data", {})
    return data


def _identity(file: Path) -> FileIdentity:
    try:
        return FileIdentity.of(os.stat(file))
    except OSError as error:
        raise unreadable(str(file), error) from error
