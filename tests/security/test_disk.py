"""A stolen disk: what a node's disk and the metadata store's tell to who has no key, and what the keys add."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from holdfast.key_file import read_key_file
from holdfast_core.model.block import Codec, Kind, SealedBlock, parse_header, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, generate_secrets
from holdfast_core.model.layout import Layout
from holdfast_storagenode.home import open_directory
from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.store import Verdict
from tests.security.rig import PHRASE, VM, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

DEFAULT_TENANT, OWN_TENANT = 1, 2


def blocks_of(run: Run, tenant: int) -> list[SealedBlock]:
    """Every block of a tenant on the disk of one node, as a thief with the program reads them."""
    path = run.folder / "data" / "node-1"
    home = open_directory(path, node_id=None, options=EngineOptions(), random_bytes=os.urandom)
    known = home.load_cluster()
    assert known is not None
    store = home.open_store(Layout.from_message(known.layout).partition_of, StoreObserver())
    try:
        ids = [entry.block_id for entry in store.scan(tenant, partition=None, after=b"", limit=10_000)]
        found = store.get(tenant, ids, bytes_max=1 << 30)
        return [verify(block.id, bytes(block.data)) for block in found if not isinstance(block, Verdict)]
    finally:
        store.close()
        home.close()


def opened_by(ring: KeyRing, blocks: Sequence[SealedBlock]) -> list[bytes]:
    """What a holder of keys makes of them, deltas with the help of what opened; what does not open is left out."""
    deltas = [block for block in blocks if block.codec is Codec.ZSTD_DELTA]
    opened: dict[bytes, bytes] = {}
    for block in blocks:
        if block not in deltas and (plain := attempt(ring, block)) is not None:
            opened[block.id] = plain
    made = [attempt(ring, block, base) for block in deltas for base in opened.items()]
    return [*opened.values(), *[plain for plain in made if plain is not None]]


def attempt(ring: KeyRing, block: SealedBlock, base: tuple[bytes, bytes] = (b"", b"")) -> bytes | None:
    """Open a block, or see that this does not work."""
    try:
        return ring.opener().open(block, base_id=base[0], base_plain=base[1] if base[0] else None)
    except HoldfastError as error:
        if error.code not in (ErrorCode.KEY_MISMATCH, ErrorCode.CORRUPT):
            raise
        return None


def test_a_nodes_disk_tells_lengths_kinds_codecs_and_epochs_and_opens_with_the_keys_alone(busy: Run) -> None:
    blocks = blocks_of(busy, DEFAULT_TENANT)
    headers = [parse_header(block.data) for block in blocks]
    # What a thief sees: how many, how long, which are index nodes, how packed, and under which epoch.
    assert {header.kind for header in headers} == set(Kind)
    assert {header.key_epoch for header in headers} == {1, 2}
    assert len({len(block.data) for block in blocks}) > 5
    assert not any(PHRASE[:16] in block.data for block in blocks)
    # Nothing opens by keys of other tenants or other clusters.
    assert opened_by(KeyRing(generate_secrets(DEFAULT_TENANT, os.urandom)), blocks) == []
    # Only who has the metadata store and the master key besides reads them.
    plain = opened_by(KeyRing(busy.tenant_secrets(DEFAULT_TENANT)), blocks)
    assert len(plain) == len(blocks)
    assert any(PHRASE in each for each in plain)


def test_all_disks_and_the_master_key_open_no_data_of_a_tenant_that_keeps_its_key(busy: Run) -> None:
    blocks = blocks_of(busy, OWN_TENANT)
    data = [block for block in blocks if parse_header(block.data).kind is not Kind.INDEX]
    secrets = busy.tenant_secrets(OWN_TENANT)
    assert secrets.data_root is None
    assert data
    assert opened_by(KeyRing(secrets), data) == []
    assert len(opened_by(KeyRing(secrets), blocks)) == len(blocks) - len(data)
    key = read_key_file(busy.folder / "keys" / "own.key")
    plain = opened_by(KeyRing(key.merged(secrets.to_message())), data)
    assert len(plain) == len(data)
    assert any(PHRASE in each for each in plain)


def test_the_metadata_stores_disk_tells_names_sizes_and_who_did_what(busy: Run) -> None:
    values = b"".join(item.key.encode() + item.value for item in busy.metadata())
    for shown in (VM, "busy-task", f"{VM}-STORED.raw", "agent-7", "snapshot.create", busy.snapshot_id):
        assert shown.encode() in values
