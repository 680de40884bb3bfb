"""Volume URIs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.uris import VolumeUri, check_volume_uri, parse_volume_uri


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
    ("text", "uri"),
    [
        ("qcow2:disk.qcow2", VolumeUri("qcow2", "disk.qcow2")),
        ("QCOW2:///images/a%20b%3F.qcow2", VolumeUri("qcow2", "/images/a b?.qcow2")),
        ("qcow2:/a.qcow2?tracking=off", VolumeUri("qcow2", "/a.qcow2", (("tracking", "off"),))),
        ("nbd://host", VolumeUri("nbd", "", host="host", port=10809)),
        ("nbd://host/", VolumeUri("nbd", "", host="host", port=10809)),
        ("nbd://[::1]:7/disks/a%20b", VolumeUri("nbd", "", host="::1", port=7, export="disks/a b")),
        ("nbd://host//a", VolumeUri("nbd", "", host="host", port=10809, export="/a")),
        ("nbd+unix:///?socket=/run/s", VolumeUri("nbd+unix", "/run/s")),
        ("nbd+unix:///disk?socket=run/s%261", VolumeUri("nbd+unix", "run/s&1", export="disk")),
        ("nbd+unix://?socket=s", VolumeUri("nbd+unix", "s")),
        ("qmp:/run/q.sock?device=virtio0", VolumeUri("qmp", "/run/q.sock", (("device", "virtio0"),))),
        (
            "qmp:/q?scratch=/var/s&device=d&agent=/a",
            VolumeUri("qmp", "/q", (("agent", "/a"), ("device", "d"), ("scratch", "/var/s"))),
        ),
        ("memdiff:mem?since=bkp-a", VolumeUri("memdiff", "mem", (("since", "bkp-a"),))),
    ],
)
def test_the_other_forms(text: str, uri: VolumeUri) -> None:
    assert parse_volume_uri(text) == uri
    assert parse_volume_uri(str(uri)) == uri


def test_paths_are_made_absolute_and_all_else_stays() -> None:
    def below(path: str) -> str:
        return "/base/" + path

    for text, absolute in (
        ("disk", "/base/disk"),
        ("file:a:b", "/base/a:b"),
        ("qcow2:d%3F", "qcow2:/base/d%3F"),
        ("nbd://Host:1/x", "nbd://host:1/x"),
        ("nbd+unix:///x?socket=s", "nbd+unix:///x?socket=/base/s"),
        ("qmp:q?device=d&agent=a&scratch=s", "qmp:/base/q?agent=/base/a&device=d&scratch=/base/s"),
        ("memdiff:m?since=snap-x", "memdiff:/base/m?since=snap-x"),
    ):
        assert str(parse_volume_uri(text).with_paths(below)) == absolute


@given(
    scheme=st.sampled_from(["file", "qcow2", "nbd+unix", "memdiff", "qmp"]),
    path=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
    value=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
)
def test_what_is_written_reads_back(scheme: str, path: str, value: str) -> None:
    needed = {"memdiff": (("since", "snap-x"),), "qmp": (("device", value),)}
    export = value if scheme == "nbd+unix" else ""
    uri = VolumeUri(scheme, "/" + path.lstrip("/") + "x", needed.get(scheme, ()), export=export)
    assert parse_volume_uri(str(uri)) == uri


@pytest.mark.parametrize("text", ["qcow2:d", "qmp:/q?device=d", "memdiff:m?since=snap-x"])
def test_what_cannot_be_read_live(text: str) -> None:
    check_volume_uri(text, live=False)
    with pytest.raises(HoldfastError, match="live") as caught:
        check_volume_uri(text, live=True)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert check_volume_uri("nbd://h", live=True).host == "h"


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
        "qcow2:",
        "qcow2:a?socket=b",
        "qcow2:a?tracking=",
        "qcow2:a?tracking=off&tracking=off",
        "qcow2:a?tracking=on",
        "qcow2:a#b",
        "qcow2://other/a",
        "nbd:host",
        "nbd:///x",
        "nbd://host:0/x",
        "nbd://host:99999/x",
        "nbd://[::1/x",
        "nbd://me@host/x",
        "nbd://host/x#y",
        "nbd://host/%00",
        "nbd://ho%20st/x",
        "nbd://host/" + "%C3%A9" * 600 + "x" * 3000,
        "nbds://host/x",
        "nbds+unix:///x?socket=s",
        "nbd://host/x?tls-certificates=y",
        "nbd+unix:///x",
        "nbd+unix://host/x?socket=s",
        "qmp:/q",
        "qmp:/q?device=",
        "memdiff:m",
        "memdiff:m?since=a/b",
    ],
)
def test_what_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_volume_uri(text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
