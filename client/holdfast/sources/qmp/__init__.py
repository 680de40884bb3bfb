"""Disks of a running QEMU, read as they stand at one moment while the guest writes on."""

from holdfast.sources.qmp.opening import open_qmp

__all__ = ["open_qmp"]
