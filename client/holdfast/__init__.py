"""Holdfast keeps the state of stateless VMs: the SDK.

`StateManager` is the way in, `AsyncStateManager` the same for asyncio. Names load when they are first used, because the
command line imports this package for every subcommand and gRPC takes a while to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.aio import AsyncStateManager
    from holdfast.cluster import (
        ClusterStatus,
        LayoutChange,
        LayoutInfo,
        LayoutPlan,
        LayoutState,
        NodeDecision,
        NodeHealing,
        NodeInfo,
    )
    from holdfast.collection import BlockExplanation, CollectionReport, CollectionState, Reclaimable
    from holdfast.descriptors import Extent
    from holdfast.files.results import FileInfo, FileKind, PointFiles, RetrievedFiles
    from holdfast.findings import (
        ClusterVerifyReport,
        DamagedRange,
        DamagedResource,
        DamageReason,
        RestoreReport,
        VerifyReport,
    )
    from holdfast.lifecycle import DiscardReceipt, KeepRule, KeptObject
    from holdfast.manager import StateManager
    from holdfast.results import (
        Codec,
        Consistency,
        ObjectForm,
        ObjectInfo,
        ObjectOrigin,
        PointInfo,
        Progress,
        ProgressCallback,
        Reading,
        Stats,
        Transfer,
        TransferStats,
        VmInfo,
        VolumeInfo,
        VolumeSpec,
    )
    from holdfast.retention import PointLock, RetainedPoint, RetentionRules
    from holdfast.sources import (
        BackupRun,
        DifferenceSource,
        MemoryDiffSource,
        RawFileSource,
        TrackingSource,
        VolumeSource,
    )
    from holdfast_core.model.errors import ErrorCode, HoldfastError
    from holdfast_core.runtime.options import TlsFiles

__all__ = [
    "AsyncStateManager",
    "BackupRun",
    "BlockExplanation",
    "ClusterStatus",
    "ClusterVerifyReport",
    "Codec",
    "CollectionReport",
    "CollectionState",
    "Consistency",
    "DamageReason",
    "DamagedRange",
    "DamagedResource",
    "DifferenceSource",
    "DiscardReceipt",
    "ErrorCode",
    "Extent",
    "FileInfo",
    "FileKind",
    "HoldfastError",
    "KeepRule",
    "KeptObject",
    "LayoutChange",
    "LayoutInfo",
    "LayoutPlan",
    "LayoutState",
    "MemoryDiffSource",
    "NodeDecision",
    "NodeHealing",
    "NodeInfo",
    "ObjectForm",
    "ObjectInfo",
    "ObjectOrigin",
    "PointFiles",
    "PointInfo",
    "PointLock",
    "Progress",
    "ProgressCallback",
    "RawFileSource",
    "Reading",
    "Reclaimable",
    "RestoreReport",
    "RetainedPoint",
    "RetentionRules",
    "RetrievedFiles",
    "StateManager",
    "Stats",
    "TlsFiles",
    "TrackingSource",
    "Transfer",
    "TransferStats",
    "VerifyReport",
    "VmInfo",
    "VolumeInfo",
    "VolumeSource",
    "VolumeSpec",
]

_HOMES = {
    "AsyncStateManager": "holdfast.aio",
    "StateManager": "holdfast.manager",
    "Extent": "holdfast.descriptors",
    "DiscardReceipt": "holdfast.lifecycle",
    "KeepRule": "holdfast.lifecycle",
    "KeptObject": "holdfast.lifecycle",
    "BackupRun": "holdfast.sources",
    "DifferenceSource": "holdfast.sources",
    "MemoryDiffSource": "holdfast.sources",
    "RawFileSource": "holdfast.sources",
    "TrackingSource": "holdfast.sources",
    "VolumeSource": "holdfast.sources",
    "ErrorCode": "holdfast_core.model.errors",
    "HoldfastError": "holdfast_core.model.errors",
    **dict.fromkeys(
        (
            "ClusterStatus",
            "LayoutChange",
            "LayoutInfo",
            "LayoutPlan",
            "LayoutState",
            "NodeDecision",
            "NodeHealing",
            "NodeInfo",
        ),
        "holdfast.cluster",
    ),
    **dict.fromkeys(("BlockExplanation", "CollectionReport", "CollectionState", "Reclaimable"), "holdfast.collection"),
    **dict.fromkeys(("FileInfo", "FileKind", "PointFiles", "RetrievedFiles"), "holdfast.files.results"),
    **dict.fromkeys(
        ("ClusterVerifyReport", "DamageReason", "DamagedRange", "DamagedResource", "RestoreReport", "VerifyReport"),
        "holdfast.findings",
    ),
    **dict.fromkeys(("PointLock", "RetainedPoint", "RetentionRules"), "holdfast.retention"),
    "TlsFiles": "holdfast_core.runtime.options",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that has it."""
    if name not in __all__:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "holdfast.results")), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
