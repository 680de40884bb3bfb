"""Capabilities: short-lived signed tokens that say what their bearer may do on a storage node.

A coordinator mints them, nodes verify them offline with the public keys that heartbeats bring. A token is a JSON Web
Token (RFC 7519) signed with Ed25519 (RFC 8037, algorithm `EdDSA`), and only that algorithm is accepted; header `kid`
names the key, `typ` is `holdfast-cap`. Claims: `iss` the cluster's id, `aud` the storage nodes of that cluster (a token
that the same key signs for anybody else is none of theirs), `tnt` the tenant's number, `vrb` the verbs, `knd` the kinds
of block, `rkn` the kinds that `get` reaches where those are fewer, `iat`, `nbf` and `exp` in whole seconds, `sid` the
session where there is one, `cep` the collection epoch that what it puts and finds is stamped with. A token with the
verb `peer` is a storage node's: `nod` names the node, and it reaches all tenants, by the calls of PeerService alone.

Clocks are passed in. Left out on purpose: revocation; a capability ends by expiry, which is why it lives briefly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import CLOCK_TOLERANCE_S

CAPABILITY_METADATA_KEY: Final = "holdfast-capability"
VERBS: Final = frozenset({"put", "get", "has", "scan", "delete", "status", "peer"})
KINDS: Final = frozenset({0, 1, 2})

_ALGORITHM: Final = "EdDSA"
_TYPE: Final = "holdfast-cap"
_TOKEN_CHARS_MAX: Final = 4096
# Times are checked here against the caller's clock, never against the library's own.
_OPTIONS: Final[Any] = {
    "verify_signature": True,
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


def _denied(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.DENIED, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What a verified token allows.

    Attributes:
        tenant: number of the only tenant whose blocks it reaches.
        verbs: subset of `VERBS`.
        kinds: subset of `KINDS`, numbered as in the header of a sealed block.
        read_kinds: the part of `kinds` that `get` reaches; ask `kinds_for`.
        expires_unix_ms: Unix time in milliseconds at which it ends.
        session: id of the session it was minted for; empty where there was none.
        collection_epoch: what blocks that it puts or finds are stamped with; 0 stamps nothing that is only found.
        node: name of the storage node that may call its peers with it; empty for all others.
    """

    tenant: int
    verbs: frozenset[str]
    kinds: frozenset[int]
    read_kinds: frozenset[int]
    expires_unix_ms: int
    session: str = ""
    collection_epoch: int = 0
    node: str = ""

    def kinds_for(self, verb: str) -> frozenset[int]:
        """Return the kinds of block that `verb` reaches; a writer's `get` reaches the index alone (ADR 0083)."""
        return self.read_kinds if verb == "get" else self.kinds

    def require(self, verb: str) -> None:
        """Return if the capability names `verb`.

        Raises:
            HoldfastError: DENIED.
        """
        if verb not in self.verbs:
            raise _denied(f"the capability does not allow {verb!r}; it allows {', '.join(sorted(self.verbs))}")

    def check_time(self, now_unix_ms: int) -> None:
        """Return if the capability has not ended; long streams ask again for each batch.

        Raises:
            HoldfastError: DENIED.
        """
        if now_unix_ms >= self.expires_unix_ms + int(CLOCK_TOLERANCE_S * 1000):
            raise _denied("the capability has expired; ask the coordinator for a fresh one")


class CapabilitySigner:
    """Mints capabilities for one cluster. `private_key` is 32 raw bytes of an Ed25519 seed and is never shown."""

    def __init__(self, key_id: str, private_key: bytes, cluster_id: str) -> None:
        self._key_id = key_id
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self._cluster_id = cluster_id
        self._audience = _audience(cluster_id)

    @property
    def key_id(self) -> str:
        """The key's id, as in the token's header."""
        return self._key_id

    @property
    def public_key(self) -> bytes:
        """32 raw bytes of the Ed25519 public key, for `CapabilityVerifier`."""
        return self._key.public_key().public_bytes_raw()

    def mint(
        self,
        *,
        tenant: int,
        verbs: frozenset[str],
        kinds: frozenset[int],
        ttl_s: float,
        now_unix_ms: int,
        session: str = "",
        read_kinds: frozenset[int] | None = None,
        collection_epoch: int = 0,
        node: str = "",
    ) -> str:
        """Return a token that is valid for `ttl_s` seconds, rounded up to whole seconds.

        Args:
            tenant: number of the only tenant whose blocks it reaches.
            verbs: some of `VERBS`.
            kinds: some of `KINDS`.
            ttl_s: how long it is valid.
            now_unix_ms: the time of minting.
            session: id of the session it is for, if any.
            read_kinds: the part of `kinds` that `get` reaches; None for all of it.
            collection_epoch: what blocks that it puts or finds are stamped with.
            node: name of the storage node that it is for, with the verb `peer`.

        Raises:
            ValueError: if a verb or kind is unknown, a set is empty, or `read_kinds` is no part of `kinds`.
        """
        if not verbs or not verbs <= VERBS:
            raise ValueError(f"verbs must be some of {sorted(VERBS)}")
        if not kinds or not kinds <= KINDS:
            raise ValueError(f"kinds must be some of {sorted(KINDS)}")
        if read_kinds is not None and (not read_kinds or not read_kinds <= kinds):
            raise ValueError(f"kinds to read must be some of {sorted(kinds)}; leave out the verb to read nothing")
        issued_s = now_unix_ms // 1000
        claims: dict[str, Any] = {
            "iss": self._cluster_id,
            "aud": self._audience,
            "tnt": tenant,
            "vrb": sorted(verbs),
            "knd": sorted(int(kind) for kind in kinds),
            "iat": issued_s,
            "nbf": issued_s,
            "exp": math.ceil(now_unix_ms / 1000 + ttl_s),
        }
        if read_kinds is not None and read_kinds != kinds:
            claims["rkn"] = sorted(int(kind) for kind in read_kinds)
        if session:
            claims["sid"] = session
        if collection_epoch:
            claims["cep"] = collection_epoch
        if node:
            claims["nod"] = node
        headers = {"kid": self._key_id, "typ": _TYPE}
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM, headers=headers)


class CapabilityVerifier:
    """Verifies tokens of one cluster against its public keys (key id to 32 raw bytes).

    Immutable and thread-safe; new keys take a new verifier.
    """

    def __init__(self, cluster_id: str, keys: Mapping[str, bytes]) -> None:
        self._cluster_id = cluster_id
        self._audience = _audience(cluster_id)
        self._keys = {key_id: Ed25519PublicKey.from_public_bytes(raw) for key_id, raw in keys.items()}

    def verify(self, token: str, *, now_unix_ms: int) -> Capability:
        """Return what `token` allows now.

        Raises:
            HoldfastError: DENIED with a message of its own for each reason: absent, malformed, unknown key, bad
                signature, foreign cluster, another audience, not yet valid, expired.
        """
        claims = self._claims(token)
        if claims.get("iss") != self._cluster_id:
            raise _denied("the capability was issued for another cluster")
        # One text and nothing else: a token for several audiences would be one that others may replay.
        if claims.get("aud") != self._audience:
            raise _denied("the capability is for another audience than the storage nodes")
        not_before_s, capability = _parse(claims)
        if now_unix_ms < not_before_s * 1000 - int(CLOCK_TOLERANCE_S * 1000):
            raise _denied("the capability is not valid yet; compare the clocks of coordinator and node")
        capability.check_time(now_unix_ms)
        return capability

    def _claims(self, token: str) -> dict[str, Any]:
        if not token:
            raise _denied(f"the call carries no capability; send it as metadata {CAPABILITY_METADATA_KEY!r}")
        if len(token) > _TOKEN_CHARS_MAX or not token.isascii():
            raise _denied("the capability is malformed")
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.InvalidTokenError, RecursionError):
            # The second for a header of a thousand brackets, which anybody may send.
            raise _denied("the capability is malformed") from None
        if header.get("typ") != _TYPE or header.get("alg") != _ALGORITHM:
            raise _denied("the capability is malformed")
        key = self._keys.get(header.get("kid", ""))
        if key is None:
            raise _denied("the capability is signed with a key that this cluster does not know")
        try:
            claims: dict[str, Any] = jwt.decode(token, key, algorithms=[_ALGORITHM], options=_OPTIONS)
        except jwt.InvalidSignatureError:
            raise _denied("the capability's signature is wrong") from None
        except jwt.InvalidTokenError:
            raise _denied("the capability is malformed") from None
        return claims


def _audience(cluster_id: str) -> str:
    return f"holdfast-storagenode/{cluster_id}"


def _parse(claims: Mapping[str, Any]) -> tuple[int, Capability]:
    """Return (not before in seconds, capability) from signed claims; a signer of ours never makes bad ones."""
    tenant, verbs, kinds = claims.get("tnt"), claims.get("vrb"), claims.get("knd")
    not_before_s, expires_s = claims.get("nbf"), claims.get("exp")
    # Absent where `get` reaches all kinds.
    read_kinds = claims.get("rkn", kinds)
    epoch = claims.get("cep", 0)
    if not (
        isinstance(tenant, int)
        and 0 <= tenant < 2**32
        and isinstance(verbs, list)
        and isinstance(kinds, list)
        and isinstance(read_kinds, list)
        and isinstance(not_before_s, int)
        and isinstance(expires_s, int)
        and isinstance(epoch, int)
        and 0 <= epoch < 2**32
    ):
        raise _denied("the capability is malformed")
    allowed = _kinds(kinds)
    capability = Capability(
        tenant=tenant,
        verbs=frozenset(str(verb) for verb in verbs) & VERBS,
        kinds=allowed,
        read_kinds=_kinds(read_kinds) & allowed,
        expires_unix_ms=expires_s * 1000,
        session=str(claims.get("sid", "")),
        collection_epoch=epoch,
        node=str(claims.get("nod", "")),
    )
    return not_before_s, capability


def _kinds(numbers: list[Any]) -> frozenset[int]:
    return frozenset(number for number in numbers if isinstance(number, int)) & KINDS
