"""Names and ids: harmless as parts of keys and paths; and errors that say whether to try again."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import SNAPSHOT_PREFIX, check_id, check_name, check_volume_name, make_id, split_ids


@pytest.mark.parametrize("name", ["a", "vm-1", "A.b_c@d+e:f", "0", "x" * 128])
def test_good_names_pass(name: str) -> None:
    assert check_name(name, "VM name") == name
    assert check_id(name, "point") == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "../a", "a\\b", "a b", "a\n", "é", "x" * 129, "a\0", "/"])
def test_bad_names_are_refused(name: str) -> None:
    for check in (check_name, check_id):
        with pytest.raises(HoldfastError, match="VM name") as caught:
            check(name, "VM name")
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_volume_names_are_shorter() -> None:
    assert check_volume_name("x" * 64) == "x" * 64
    with pytest.raises(HoldfastError, match="64 are allowed"):
        check_volume_name("x" * 65)


@given(random_bytes=st.binary(min_size=16, max_size=16))
def test_ids_hold_their_random_bytes_and_are_names(random_bytes: bytes) -> None:
    made = make_id(SNAPSHOT_PREFIX, random_bytes)
    assert check_id(made, "point") == made
    assert base64.b32decode(made.removeprefix(SNAPSHOT_PREFIX).upper() + "=" * 6) == random_bytes


def test_an_id_takes_16_random_bytes() -> None:
    with pytest.raises(ValueError, match="16 random bytes"):
        make_id(SNAPSHOT_PREFIX, b"few")


def test_packed_ids_split_evenly() -> None:
    ids = [bytes([number]) * 32 for number in range(3)]
    assert split_ids(b"".join(ids)) == ids
    assert split_ids(b"") == []
    with pytest.raises(HoldfastError) as caught:
        split_ids(bytes(33))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_errors_carry_what_programs_need() -> None:
    error = HoldfastError(ErrorCode.BUSY, "wait", facts={"seconds_left": "3"}, block_ids=[b"a"])
    assert (str(error), error.retryable, error.facts, error.block_ids) == ("wait", True, {"seconds_left": "3"}, (b"a",))
    assert "BUSY" in repr(error)
    assert not HoldfastError(ErrorCode.CORRUPT, "no").retryable
