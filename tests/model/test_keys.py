"""Secrets: derived by purpose, carried whole, wrapped for one purpose, never shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from blake3 import blake3

from holdfast_core.model.block import Codec, Kind
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import (
    KeyRing,
    TenantSecrets,
    generate_secrets,
    master_fingerprint,
    unwrap_secret,
    wrap_secret,
)
from tests.model.strategies import secrets_of, stream

MASTER = bytes(range(32))
NONCE = bytes(range(24))


def test_secrets_are_fresh_and_independent() -> None:
    asked: list[int] = []

    def random_bytes(count: int) -> bytes:
        asked.append(count)
        return stream(str(len(asked)), count)

    secrets = generate_secrets(3, random_bytes)
    assert asked == [32] * 4
    assert secrets.tenant == 3
    parts = {secrets.data_root, secrets.structure_root, secrets.data_epochs[1], secrets.structure_epochs[1]}
    assert len(parts) == 4


def test_secrets_survive_their_message() -> None:
    secrets = secrets_of("message")
    rotated = dataclasses.replace(secrets, data_epochs={2: bytes(32), **secrets.data_epochs})
    for each in (secrets, rotated, secrets.without_data()):
        assert TenantSecrets.from_message(each.to_message()) == each
    assert [epoch.epoch for epoch in rotated.to_message().data_epochs] == [1, 2]
    assert not KeyRing(secrets.without_data()).has_data


def test_no_key_is_shown() -> None:
    secrets = secrets_of("shown")
    ring = KeyRing(secrets)
    text = repr(secrets) + str(secrets) + repr(ring) + repr(ring.opener()) + repr(ring.sealer(Kind.VOLUME, 1))
    for key in (secrets.data_root, secrets.structure_root, secrets.data_epochs[1], secrets.structure_epochs[1]):
        assert key is not None
        assert key.hex() not in text
        assert repr(key) not in text
    assert "data_epochs=[1]" in text


def test_malformed_messages_are_corrupt() -> None:
    good = secrets_of("good").to_message()
    messages = [secrets_of("good").to_message() for _ in range(7)]
    messages[0].data_root = b"short"
    messages[1].structure_epochs[0].secret = b"short"
    messages[2].structure_epochs[0].epoch = 0
    messages[3].data_root = b""
    del messages[4].data_epochs[:]
    del messages[5].structure_epochs[:]
    messages[6].data_epochs.append(good.data_epochs[0])
    for message in messages:
        with pytest.raises(HoldfastError) as caught:
            TenantSecrets.from_message(message)
        assert caught.value.code is ErrorCode.CORRUPT


def test_the_fingerprint_outlives_key_epochs() -> None:
    secrets = secrets_of("rotation")
    ring = KeyRing(secrets)
    rotated = KeyRing(dataclasses.replace(secrets, data_epochs={**secrets.data_epochs, 2: bytes(32)}))
    assert rotated.fingerprint(b"x") == ring.fingerprint(b"x")
    assert rotated.cutting_key == ring.cutting_key
    assert (ring.data_epoch_newest, rotated.data_epoch_newest, rotated.structure_epoch_newest) == (1, 2, 1)
    old = ring.sealer(Kind.APPLICATION, 1).seal(b"old", codec=Codec.STORED)
    new = rotated.sealer(Kind.APPLICATION, 2).seal(b"old", codec=Codec.STORED)
    assert old.id != new.id
    assert rotated.opener().open(old) == rotated.opener().open(new) == b"old"


def test_keys_differ_by_purpose_and_tenant() -> None:
    ring, other = KeyRing(secrets_of("one")), KeyRing(secrets_of("two"))
    keys = [ring.cutting_key, ring.record_mac_key, other.cutting_key, other.record_mac_key]
    assert len({*keys, ring.fingerprint(b""), other.fingerprint(b"")}) == 6
    root = secrets_of("one").data_root
    assert root is not None
    assert (
        ring.fingerprint(b"abc")
        == blake3(b"abc", key=blake3(root, derive_key_context="holdfast v1 fingerprint key").digest()).digest()
    )


def test_a_wrong_fingerprint_is_corrupt() -> None:
    ring = KeyRing(secrets_of("check"))
    ring.check_fingerprint(b"right", ring.fingerprint(b"right"), block_id=bytes(32))
    with pytest.raises(HoldfastError) as caught:
        ring.check_fingerprint(b"wrong", ring.fingerprint(b"right"), block_id=bytes(32))
    assert caught.value.code is ErrorCode.CORRUPT
    assert caught.value.block_ids == (bytes(32),)


def test_a_withheld_data_secret_says_so() -> None:
    ring = KeyRing(secrets_of("withheld").without_data())
    uses: list[Callable[[], object]] = [
        lambda: ring.fingerprint(b""),
        lambda: ring.cutting_key,
        lambda: ring.record_mac_key,
        lambda: ring.data_epoch_newest,
    ]
    for use in uses:
        with pytest.raises(HoldfastError, match="keeps its data secret") as caught:
            use()
        assert caught.value.code is ErrorCode.KEY_MISMATCH


def test_a_wrapped_secret_opens_for_its_purpose_alone() -> None:
    wrapped = wrap_secret(MASTER, b"the secret", "tenant 1", NONCE)
    assert b"the secret" not in wrapped.SerializeToString()
    assert unwrap_secret(MASTER, wrapped, "tenant 1") == b"the secret"
    with pytest.raises(HoldfastError) as caught:
        unwrap_secret(MASTER, wrapped, "tenant 2")
    assert caught.value.code is ErrorCode.CORRUPT
    wrapped.nonce = NONCE[:-1]
    with pytest.raises(HoldfastError) as caught:
        unwrap_secret(MASTER, wrapped, "tenant 1")
    assert caught.value.code is ErrorCode.CORRUPT


def test_another_master_key_is_named() -> None:
    other = bytes(32)
    wrapped = wrap_secret(MASTER, b"the secret", "tenant 1", NONCE)
    with pytest.raises(HoldfastError) as caught:
        unwrap_secret(other, wrapped, "tenant 1")
    assert caught.value.code is ErrorCode.KEY_MISMATCH
    assert caught.value.facts == {
        "wrapped_by": master_fingerprint(MASTER).hex(),
        "given": master_fingerprint(other).hex(),
    }
    assert master_fingerprint(MASTER).hex() in caught.value.message


def test_lengths_are_checked() -> None:
    with pytest.raises(HoldfastError) as caught:
        master_fingerprint(b"short")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(ValueError, match="24 bytes"):
        wrap_secret(MASTER, b"", "p", b"short")
