"""Texts from people: addresses, sizes, TLS files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import (
    TlsFiles,
    format_address,
    format_size,
    is_loopback,
    parse_address,
    parse_addresses,
    parse_size,
    tls_files,
)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("host-1.example:7400", ("host-1.example", 7400)), ("[::1]:1", ("::1", 1))],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed
    assert format_address(*parsed) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":7400", "host:x", "host:-1", "host:65536", "::1:7400", "h:٣"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(HoldfastError, match="is not an address") as caught:
        parse_address(text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_lists_of_addresses() -> None:
    assert parse_addresses("a:1, b:2,,unix:/run/x") == ("a:1", "b:2", "unix:/run/x")
    for text in ("", " , ", "a:1,b"):
        with pytest.raises(HoldfastError):
            parse_addresses(text)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/holdfast", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example:1", False),
    ],
)
def test_what_stays_on_this_machine(address: str, local: bool) -> None:
    assert is_loopback(address) is local


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("10GB", 10**10),
        ("1.5GiB", 3 << 29),
        ("4k", 4000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1", "1.5", "64KiBs", "1e3", "0x10", "1 0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_size(text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@given(st.integers(min_value=0, max_value=1 << 60))
def test_sizes_for_people_are_short_and_close(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 12
    number, unit = text.split()
    assert float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit] == (
        pytest.approx(size, rel=0.006)
    )


def test_tls_is_all_or_nothing() -> None:
    path = Path("x")
    assert tls_files(ca=None, cert=None, key=None) is None
    assert tls_files(ca=path, cert=path, key=path) == TlsFiles(ca=path, cert=path, key=path)
    with pytest.raises(HoldfastError, match="TLS takes three files"):
        tls_files(ca=path, cert=None, key=path)
