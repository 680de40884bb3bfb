"""The options of `vm register`."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.cli.vms import parse_volumes
from holdfast.results import Codec, VolumeSpec
from holdfast_core.model.errors import ErrorCode, HoldfastError


def test_volumes_with_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    volumes = parse_volumes(
        ["root=disk.raw", "data=file:/srv/d=1.raw", "mem=/dev/shm/m"],
        block_sizes=["root=16KiB"],
        codecs=["data=lz4"],
        live=["mem"],
    )
    assert volumes == {
        "root": VolumeSpec(uri=str(tmp_path / "disk.raw"), block_bytes=16384),
        "data": VolumeSpec(uri="file:/srv/d=1.raw", codec=Codec.LZ4),
        "mem": VolumeSpec(uri="/dev/shm/m", live=True),
    }


@pytest.mark.parametrize(
    ("volumes", "options", "says"),
    [
        (["root"], {}, "--volume 'root' is incomplete; write NAME=URI"),
        (["=x"], {}, "is incomplete"),
        (["root="], {}, "is incomplete"),
        (["root=a", "root=b"], {}, "given twice for 'root'"),
        (["root=a"], {"block_sizes": ["data=64KiB"]}, "which no --volume gives"),
        (["root=a"], {"block_sizes": ["root=large"]}, "is not a size"),
        (["root=a"], {"codecs": ["root=zip"]}, "there is no codec 'zip'; choose one of default, stored, lz4, zstd"),
        (["root=a"], {"live": ["data"]}, "--live names the volume 'data'"),
    ],
)
def test_mistakes(volumes: list[str], options: dict[str, list[str]], says: str) -> None:
    given: dict[str, list[str]] = {"block_sizes": [], "codecs": [], "live": [], **options}
    with pytest.raises(HoldfastError) as caught:
        parse_volumes(volumes, block_sizes=given["block_sizes"], codecs=given["codecs"], live=given["live"])
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert says in caught.value.message
