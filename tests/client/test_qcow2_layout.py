"""The layout of qcow2 images, against QEMU's own opinion and against a plain count."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.restoring.qcow2 import CLUSTER_BYTES, ClusterMap, Qcow2Layout
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import GIB, MIB, VOLUME_SIZE_BYTES_MAX

RANGES = st.lists(st.tuples(st.integers(0, 4 * GIB), st.integers(1, 3 * MIB)), max_size=12)


def layout_of(size: int, ranges: list[tuple[int, int]]) -> Qcow2Layout:
    clusters = ClusterMap()
    for start, length in ranges:
        if start < size:
            clusters.add(start, min(start + length, size))
    return Qcow2Layout(size, clusters)


@given(size=st.integers(1, 5 * GIB), ranges=RANGES)
def test_every_cluster_has_a_place_of_its_own_behind_the_tables(size: int, ranges: list[tuple[int, int]]) -> None:
    layout = layout_of(size, ranges)
    marked = sorted(
        {
            cluster
            for start, length in ranges
            if start < size
            for cluster in range(start // CLUSTER_BYTES, (min(start + length, size) - 1) // CLUSTER_BYTES + 1)
        }
    )
    places = [layout.offset_of(cluster * CLUSTER_BYTES) for cluster in marked]
    assert places == [layout.file_bytes - (len(marked) - at) * CLUSTER_BYTES for at in range(len(marked))]
    metadata = [(offset, offset + len(data)) for offset, data in layout.metadata()]
    assert len({offset for offset, _ in metadata}) == len(metadata)
    assert max(end for _, end in metadata) <= layout.file_bytes - len(marked) * CLUSTER_BYTES
    beyond = (marked[-1] + 1 if marked else 0) * CLUSTER_BYTES
    with pytest.raises(KeyError):
        layout.offset_of(beyond)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 5 * GIB), ranges=RANGES)
def test_qemu_finds_no_fault(tmp_path: Path, size: int, ranges: list[tuple[int, int]]) -> None:
    layout = layout_of(size, ranges)
    path = tmp_path / "image.qcow2"
    with path.open("wb") as stream:
        stream.truncate(layout.file_bytes)
        for offset, data in layout.metadata():
            stream.seek(offset)
            stream.write(data)
    checked = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "No errors" in checked.stdout


def test_an_image_that_qemu_would_not_open_is_refused() -> None:
    assert layout_of(VOLUME_SIZE_BYTES_MAX, [(0, MIB)]).file_bytes < 64 * MIB
    with pytest.raises(HoldfastError, match="restore it as raw") as caught:
        Qcow2Layout(4 * 1024 * VOLUME_SIZE_BYTES_MAX, ClusterMap())
    assert caught.value.code is ErrorCode.LIMIT_EXCEEDED
