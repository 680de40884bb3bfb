"""The stores that the tests of this folder run on: the embedded engine, etcd with one member and with three, and the
simulation's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.sqlite import IN_MEMORY, SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore
from tests.sim.metadata import MemoryMetadata
from tests.support.etcd import EtcdCluster

_PREFIXES = itertools.count()


@pytest.fixture(scope="session")
def one_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd of one member; shared, so tests keep below prefixes of their own and leave it running."""
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd-1")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def three_etcds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd of three members; shared, and whole again after a test that kills members."""
    with EtcdCluster(3, tmp_path_factory.mktemp("etcd-3")) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "etcd-1", "etcd-3", "simulated"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MetadataStore]:
    """Every engine in turn."""
    opened = await _open_store(request, tmp_path)
    yield opened
    await opened.close()


async def _open_store(request: pytest.FixtureRequest, tmp_path: Path) -> MetadataStore:
    match request.param:
        case "sqlite-file":
            return await SqliteStore.open(tmp_path / "metadata.db", SystemClock())
        case "sqlite-memory":
            return await SqliteStore.open(IN_MEMORY, SystemClock())
        case "simulated":
            return MemoryMetadata(asyncio.get_running_loop())
        case "etcd-1":
            return await EtcdStore.open(request.getfixturevalue("one_etcd").endpoints)
        case _:
            return await EtcdStore.open(request.getfixturevalue("three_etcds").endpoints)


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses, below which nothing exists."""
    return f"test-{next(_PREFIXES)}/"
