"""The cluster is shared by the rows of a file: a row that left something behind would fail the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.testing import MemoryCluster
from tests.bad_input.rig import Rig, make_vm


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("bad-input")
    with MemoryCluster(nodes=3) as cluster, cluster.state_manager() as manager:
        yield Rig(
            cluster=cluster,
            manager=manager,
            one=make_vm(manager, folder, "one"),
            two=make_vm(manager, folder, "two"),
            storage_id=manager.persist_application_data("task", b"data"),
            folder=folder,
        )


@pytest.fixture
def rig(shared: Rig, tmp_path: Path) -> Rig:
    return replace(shared, folder=tmp_path)
