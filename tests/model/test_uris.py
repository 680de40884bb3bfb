"""Volume URIs."""

from __future__ import annotations

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.uris import VolumeUri, parse_volume_uri


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/images/root.raw", "/images/root.raw"),
        ("root.raw", "root.raw"),
        ("./odd:name.raw", "./odd:name.raw"),
        ("/images/a%20b", "/images/a%20b"),
        ("file:/images/root.raw", "/images/root.raw"),
        ("file:root.raw", "root.raw"),
        ("FILE:///images/a%20b.raw", "/images/a b.raw"),
        ("file://localhost/images/root.raw", "/images/root.raw"),
    ],
)
def test_files(text: str, path: str) -> None:
    assert parse_volume_uri(text) == VolumeUri("file", path)


@pytest.mark.parametrize(
    "scheme", ["qcow2:x.qcow2", "nbd://host:10809/x", "nbd+unix:///x?socket=s", "qmp:/s", "memdiff:/m"]
)
def test_what_comes_later_says_so(scheme: str) -> None:
    with pytest.raises(HoldfastError, match="not supported yet") as caught:
        parse_volume_uri(scheme)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 5000,
        "http://host/x",
        "file:",
        "file://",
        "file://other/x",
        "file:///x?y=1",
        "file:///x#f",
        "a\0b",
        "file:%00",
    ],
)
def test_what_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_volume_uri(text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
