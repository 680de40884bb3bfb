"""The public surface of `holdfast`, pinned: a change of it is a decision and shows here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import pytest

import holdfast
from holdfast import AsyncStateManager, StateManager

PUBLIC: Final = [
    "AsyncStateManager",
    "BackupRun",
    "BlockExplanation",
    "ClusterStatus",
    "Codec",
    "CollectionReport",
    "CollectionState",
    "Consistency",
    "DifferenceSource",
    "DiscardReceipt",
    "ErrorCode",
    "Extent",
    "FileInfo",
    "FileKind",
    "HoldfastError",
    "KeepRule",
    "KeptObject",
    "LayoutInfo",
    "LayoutChange",
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

THE_FIVE: Final = {
    "create_snapshot": ({"vm_id": "str"}, "str"),
    "incremental_backup": ({"vm_id": "str", "snapshot_id": "str"}, "str"),
    "restore_vm": ({"snapshot_id": "str", "backup_id": "str"}, None),
    "persist_application_data": ({"task_id": "str", "data": "bytes"}, "str"),
    "retrieve_application_data": ({"storage_id": "str"}, "bytes"),
}
"""The mission's calls: their positional parameters with types, and what they return."""

AROUND_THEM: Final = [
    *("register_vm", "vm", "list_vms", "discard_vm", "points", "point", "forget", "verify", "stats"),
    *("persist_stream", "retrieve_stream", "retrieve_to_file", "application_data", "list_application_data"),
    *("lock", "unlock", "set_retention", "apply_retention"),
    *("serve_point", "save_overlay"),
    *("start_collection", "collection_state", "collect", "explain_block", "reclaimable"),
    *("set_node", "remove_node", "layout_history"),
    *("persist_files", "list_files", "read_file", "retrieve_files"),
    *("forget_application_data", "cluster_status", "nodes", "layout", "plan_layout", "apply_layout", "settle", "close"),
]


def test_the_public_names_are_these() -> None:
    assert sorted(holdfast.__all__) == sorted(PUBLIC)
    assert all(hasattr(holdfast, name) for name in holdfast.__all__)


@pytest.mark.parametrize("manager", [StateManager, AsyncStateManager])
@pytest.mark.parametrize("name", THE_FIVE)
def test_the_five_calls_have_their_signatures(manager: type, name: str) -> None:
    call: Callable[..., Any] = getattr(manager, name)
    positional, returned = THE_FIVE[name]
    parameters = list(inspect.signature(call).parameters.values())[1:]
    own = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [each.name for each in own] == list(positional)
    assert all(each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for each in own)
    assert {each.name: each.annotation for each in own} == positional
    if returned is not None:
        assert inspect.signature(call).return_annotation == returned
    # Whatever else a call takes is named by the caller and may be left out.
    assert all(each.default is not inspect.Parameter.empty for each in parameters if each not in own)


@pytest.mark.parametrize("name", sorted({*THE_FIVE, *AROUND_THEM}))
def test_both_managers_have_every_call_with_the_same_parameters(name: str) -> None:
    blocking = inspect.signature(getattr(StateManager, name))
    waiting = inspect.signature(getattr(AsyncStateManager, name))
    assert list(blocking.parameters) == list(waiting.parameters)
    assert inspect.getdoc(getattr(StateManager, name))
    assert inspect.getdoc(getattr(AsyncStateManager, name))


def test_managers_are_context_managers() -> None:
    assert hasattr(StateManager, "__enter__")
    assert hasattr(AsyncStateManager, "__aenter__")


def test_a_volume_of_a_point_is_an_image_here_and_a_file_there() -> None:
    image = inspect.signature(AsyncStateManager.open_image)
    file = inspect.signature(StateManager.open_volume)
    assert list(image.parameters) == list(file.parameters)
    assert list(image.parameters)[1:3] == ["point_id", "volume"]
