"""What the model's tests draw from."""

from __future__ import annotations

import hashlib

from hypothesis import strategies as st

from holdfast_core.model.keys import KeyRing, TenantSecrets, generate_secrets


def stream(label: str, size: int) -> bytes:
    """Deterministic bytes that do not compress."""
    return hashlib.shake_128(label.encode()).digest(size)


def secrets_of(label: str, tenant: int = 7) -> TenantSecrets:
    """Deterministic secrets of a tenant."""
    source = iter(range(1000))
    return generate_secrets(tenant, lambda count: stream(f"{label} {next(source)}", count))


def ring_of(label: str, tenant: int = 7) -> KeyRing:
    """A key ring over `secrets_of`."""
    return KeyRing(secrets_of(label, tenant))


def identity(number: int) -> bytes:
    """A made-up block id."""
    return hashlib.blake2s(number.to_bytes(16, "little")).digest()


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Bytes of many kinds: short and arbitrary, long and repetitive, long and random, mixed."""
    kind = draw(st.sampled_from(["short", "repeated", "random", "mixed"]))
    if kind == "short":
        return draw(st.binary(max_size=300))
    if kind == "repeated":
        return draw(st.binary(min_size=1, max_size=40)) * draw(st.integers(1, 3000))
    noise = stream(str(draw(st.integers(0, 2**32))), draw(st.integers(1, 70_000)))
    if kind == "random":
        return noise
    return noise + bytes(draw(st.integers(0, 70_000))) + draw(st.binary(max_size=50)) + noise


ids = st.binary(min_size=32, max_size=32)
