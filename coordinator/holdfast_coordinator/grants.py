"""What a caller needs to talk to the nodes: layouts, addresses, a capability for just that call's purpose, keys.

Keys leave only over TLS, on the loopback interface or on a Unix socket (DESIGN section 5). The service host already
refuses to listen in plain text elsewhere; this checks each call's peer once more, because a mistake here is final.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.view import ClusterState
from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.limits import CAPABILITY_TTL_S
from holdfast_core.runtime.clock import Clock
from holdfast_proto.v1.common_pb2 import Grant, NodeStatus, TenantKeys
from holdfast_proto.v1.records_pb2 import SessionRecord

POINT_KINDS: Final = frozenset({int(Kind.VOLUME), int(Kind.INDEX)})
OBJECT_KINDS: Final = frozenset({int(Kind.APPLICATION), int(Kind.INDEX)})
ALL_KINDS: Final = POINT_KINDS | OBJECT_KINDS
INDEX_KINDS: Final = frozenset({int(Kind.INDEX)})

# A session writes, asks what is there, and reads its parent's index and the bases of deltas.
SESSION_VERBS: Final = frozenset({"put", "has", "get"})
# A reader reads; `has` lets it verify a point on the nodes without fetching it.
READER_VERBS: Final = frozenset({"get", "has"})


@dataclass(frozen=True, slots=True)
class Token:
    """A capability and the Unix time in milliseconds at which it ends."""

    text: str
    expires_unix_ms: int


class Grants:
    """Mints capabilities for one tenant and makes grants of them."""

    def __init__(self, chain: KeyChain, secrets: TenantSecrets, clock: Clock) -> None:
        """Sign with the chain's key of the moment; grant the tenant's secrets."""
        self._chain = chain
        self._tenant = secrets.tenant
        self._secrets = secrets
        self._clock = clock
        self._own: dict[tuple[str, str, int], Token] = {}

    def session_token(self, session: SessionRecord, kinds: frozenset[int], *, may_read_data: bool) -> Token:
        """Mint what a session needs to write and to read what it builds on: the index, and data for who may read it.

        What it puts and finds is stamped with the collection epoch that it began under, which is what keeps that from
        being collected while the session is open.
        """
        return self._mint(
            SESSION_VERBS,
            kinds,
            session.session_id,
            read_kinds=kinds if may_read_data else INDEX_KINDS,
            collection_epoch=session.collection_epoch,
        )

    def reader_token(self, kinds: frozenset[int]) -> Token:
        """Mint what a reader of points or of objects needs."""
        return self._mint(READER_VERBS, kinds)

    def index_reader(self) -> str:
        """Return the coordinator's own capability to read index nodes, and nothing else."""
        return self._own_token("get", INDEX_KINDS)

    def presence_asker(self, collection_epoch: int = 0) -> str:
        """Return the coordinator's own capability to ask for presence.

        What is found is stamped with `collection_epoch`: a commit asks under its session's. 0 stamps nothing.
        """
        return self._own_token("has", ALL_KINDS, collection_epoch)

    def size_scanner(self) -> str:
        """Return the coordinator's own capability to list ids and lengths."""
        return self._own_token("scan", ALL_KINDS)

    def deleter(self) -> str:
        """Return the coordinator's own capability to delete what a collection found unreached; nobody else gets one."""
        return self._own_token("delete", ALL_KINDS)

    def is_past_half(self, issued_unix_ms: int) -> bool:
        """Return whether a capability minted then has lived more than half its life."""
        return self._clock.now_unix_ms() - issued_unix_ms > CAPABILITY_TTL_S * 500

    def reader_grant(self, state: ClusterState, kinds: frozenset[int]) -> Grant:
        """Put together what a reader of points or of objects needs. The caller has checked `check_keys_may_leave`."""
        return self._grant(state, self.reader_token(kinds), self._secrets.to_message(), may_read_data=True)

    def session_grant(
        self, state: ClusterState, session: SessionRecord, kinds: frozenset[int], *, may_read_data: bool
    ) -> Grant:
        """Put together what a session needs. The caller has checked `check_keys_may_leave`.

        Who may not read data gets the one data epoch that the session seals with: a thief of its keys who also has a
        disk opens what was written under that epoch, and nothing older.
        """
        keys = self._secrets.to_message() if may_read_data else confined(self._secrets, session.key_epoch)
        token = self.session_token(session, kinds, may_read_data=may_read_data)
        return self._grant(state, token, keys, may_read_data=may_read_data)

    def _grant(self, state: ClusterState, token: Token, keys: TenantKeys, *, may_read_data: bool) -> Grant:
        return Grant(
            layouts=state.layout_set.messages,
            nodes=map(without_counters, state.nodes),
            capability=token.text,
            capability_expires_unix_ms=token.expires_unix_ms,
            keys=keys,
            layout_revision=state.layout_set.revision,
            may_read_data=may_read_data,
        )

    def _own_token(self, verb: str, kinds: frozenset[int], collection_epoch: int = 0) -> str:
        # By the key that signs, too: one that was stolen and removed leaves nothing behind that nodes would refuse.
        place = (self._chain.signing_key().key_id, verb, collection_epoch)
        token = self._own.get(place)
        if token is None or self._is_old(token):
            # Keys and epochs come and go; what was minted under past ones is let go of here.
            self._own = {place: kept for place, kept in self._own.items() if not self._is_old(kept)}
            token = self._own[place] = self._mint(frozenset({verb}), kinds, collection_epoch=collection_epoch)
        return token.text

    def _is_old(self, token: Token) -> bool:
        left_ms = token.expires_unix_ms - self._clock.now_unix_ms()
        # A clock that went back makes a token look younger than one can be; nodes would find it not valid yet.
        return not CAPABILITY_TTL_S * 500 <= left_ms <= CAPABILITY_TTL_S * 1000

    def _mint(
        self,
        verbs: frozenset[str],
        kinds: frozenset[int],
        session_id: str = "",
        *,
        read_kinds: frozenset[int] | None = None,
        collection_epoch: int = 0,
    ) -> Token:
        now_unix_ms = self._clock.now_unix_ms()
        text = self._chain.capability_signer().mint(
            tenant=self._tenant,
            verbs=verbs,
            kinds=kinds,
            ttl_s=CAPABILITY_TTL_S,
            now_unix_ms=now_unix_ms,
            session=session_id,
            read_kinds=read_kinds,
            collection_epoch=collection_epoch,
        )
        return Token(text, now_unix_ms + int(CAPABILITY_TTL_S * 1000))


def confined(secrets: TenantSecrets, data_epoch: int) -> TenantKeys:
    """Return a tenant's keys as a writer gets them: of the data secrets only the epoch that it seals with. Pure.

    The root stays, without which nobody recognises what is there already, cuts, or authenticates a record; it opens
    nothing. Where the tenant keeps its data secret to itself there is none of it to begin with.
    """
    keys = secrets.to_message()
    del keys.data_epochs[:]
    keys.data_epochs.extend(epoch for epoch in secrets.to_message().data_epochs if epoch.epoch == data_epoch)
    return keys


def without_counters(node: NodeStatus) -> NodeStatus:
    """Return of a node what it takes to talk to it. What it holds would tell one tenant what others write. Pure."""
    return NodeStatus(
        node_id=node.node_id,
        address=node.address,
        zone=node.zone,
        up=node.up,
        full=node.full,
        layout_epoch=node.layout_epoch,
    )


def check_keys_may_leave(*, peer: str, encrypted: bool) -> None:
    """Check that keys may be released to this peer, as gRPC names it (`ipv4:127.0.0.1:40000`, `unix:`…).

    Raises:
        HoldfastError: DENIED if they would travel in plain text between machines.
    """
    if encrypted or peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")):
        return
    raise HoldfastError(
        ErrorCode.DENIED,
        "keys are released over TLS, loopback or a Unix socket only; connect to the coordinator by TLS",
    )
