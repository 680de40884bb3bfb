"""The audit log's tree against the RFC's own definition and vectors, and heads against keys."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.audit.heads import HeadSigner, HeadVerifier
from holdfast_core.model.audit.merkle import (
    EMPTY_ROOT,
    Frontier,
    check_consistency,
    complete_subtrees,
    consistency_path,
    consistency_ranges,
    inclusion_path,
    inclusion_ranges,
    leaf_hash,
    node_hash,
    root_from_inclusion,
    tree_root,
)
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.audit_pb2 import SignedHead

# Leaves, and roots over the first n of them, from the reference tests of Certificate Transparency (RFC 6962).
VECTORS = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
SMALL = 66
LEAVES = [leaf_hash(str(number).encode()) for number in range(SMALL)]


def plain_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162, section 2.1.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    half = max(2**power for power in range(len(leaves).bit_length()) if 2**power < len(leaves))
    return hashlib.sha256(b"\x01" + plain_root(leaves[:half]) + plain_root(leaves[half:])).digest()


def plain_subproof(old: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 9162, section 2.1.4.1, word for word."""
    if old == len(leaves):
        return [] if whole else [plain_root(leaves)]
    half = max(2**power for power in range(len(leaves).bit_length()) if 2**power < len(leaves))
    if old <= half:
        return [*plain_subproof(old, leaves[:half], whole), plain_root(leaves[half:])]
    return [*plain_subproof(old - half, leaves[half:], False), plain_root(leaves[:half])]


def strict(leaves: list[bytes]) -> Callable[[int, int], bytes]:
    """Roots of complete subtrees; refuses to tell any other, because the log keeps no other."""
    known: dict[tuple[int, int], bytes] = {}

    def subtree(start: int, end: int) -> bytes:
        width = end - start
        assert width & (width - 1) == 0
        assert start % width == 0
        assert end <= len(leaves)
        if (start, end) not in known:
            middle = start + width // 2
            known[start, end] = leaves[start] if width == 1 else node_hash(subtree(start, middle), subtree(middle, end))
        return known[start, end]

    return subtree


def test_the_well_known_roots() -> None:
    leaves = [leaf_hash(bytes.fromhex(text)) for text in VECTORS]
    for size, root in enumerate(ROOTS):
        assert Frontier().extended(leaves[:size]).root.hex() == root
        assert tree_root(0, size, strict(leaves)).hex() == root
    assert EMPTY_ROOT.hex() == ROOTS[0]


def test_every_proof_of_small_trees() -> None:
    subtree = strict(LEAVES)
    roots = [plain_root(LEAVES[:size]) for size in range(SMALL + 1)]
    for size in range(SMALL + 1):
        assert Frontier().extended(LEAVES[:size]).root == tree_root(0, size, subtree) == roots[size]
        for index in range(size):
            path = inclusion_path(index, size, subtree)
            assert root_from_inclusion(index, size, LEAVES[index], path) == roots[size]
        for old in range(size + 1):
            path = consistency_path(old, size, subtree)
            assert path == (plain_subproof(old, LEAVES[:size], True) if old else [])
            check_consistency(old, size, roots[old], roots[size], path)


def ranges_root(start: int, end: int) -> bytes:
    """A stand-in for subtrees of trees too large to hash: any hash that depends on the range alone."""
    return hashlib.sha256(f"{start} {end}".encode()).digest()


@given(st.integers(1, 2**40), st.data())
def test_proofs_of_large_trees(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    old = data.draw(st.integers(0, size))
    for ranges, covered in ((inclusion_ranges(index, size), 1), (consistency_ranges(old, size), 0)):
        assert len(ranges) <= size.bit_length() + 1
        pieces = sorted(piece for each in ranges for piece in complete_subtrees(*each))
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(pieces))
        if ranges and covered:
            assert sum(end - start for start, end in pieces) == size - 1
    # Built from the same complete subtrees, whatever they hash to, a proof gives the very root of its tree.
    leaf = ranges_root(index, index + 1)
    path = inclusion_path(index, size, _consistent(index))
    assert root_from_inclusion(index, size, leaf, path) == tree_root(0, size, _consistent(index))


def _consistent(index: int) -> Callable[[int, int], bytes]:
    """Subtrees that hash `index`'s branch in full and stand in for all others."""

    def subtree(start: int, end: int) -> bytes:
        if not start <= index < end or end - start == 1:
            return ranges_root(start, end)
        middle = (start + end) // 2
        return node_hash(subtree(start, middle), subtree(middle, end))

    return subtree


@given(st.lists(st.binary(max_size=4), max_size=40), st.data())
def test_a_frontier_is_the_same_however_it_grew(lines: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(line) for line in lines]
    cut = data.draw(st.integers(0, len(leaves)))
    whole = Frontier().extended(leaves[:cut])
    for leaf in leaves[cut:]:
        whole = whole.append(leaf)
    assert whole == Frontier().extended(leaves)
    assert whole.root == plain_root(leaves)


@pytest.mark.parametrize("size", range(2, 18))
def test_every_changed_proof_is_refused(size: int) -> None:
    subtree = strict(LEAVES)
    root = plain_root(LEAVES[:size])
    for index in range(size):
        path = inclusion_path(index, size, subtree)
        for at in range(len(path)):
            changed = [*path[:at], bytes(32), *path[at + 1 :]]
            assert root_from_inclusion(index, size, LEAVES[index], changed) != root
        assert root_from_inclusion(index, size, LEAVES[index - 1], path) != root
        for wrong in (path[1:], [*path, bytes(32)], [path[0][:31], *path[1:]]):
            assert refusal(root_from_inclusion, index, size, LEAVES[index], wrong) is ErrorCode.CORRUPT
    for old in range(1, size):
        path, old_root = consistency_path(old, size, subtree), plain_root(LEAVES[:old])
        for at in range(len(path)):
            changed = [*path[:at], bytes(32), *path[at + 1 :]]
            assert refusal(check_consistency, old, size, old_root, root, changed) is ErrorCode.CORRUPT
        for roots in ((bytes(32), root), (old_root, bytes(32))):
            assert refusal(check_consistency, old, size, *roots, path) is ErrorCode.CORRUPT
        assert refusal(check_consistency, old, size, old_root, root, path[1:]) is ErrorCode.CORRUPT
    assert refusal(check_consistency, size, size, root, bytes(32), []) is ErrorCode.CORRUPT
    assert refusal(check_consistency, 0, size, bytes(32), root, []) is ErrorCode.CORRUPT
    assert refusal(check_consistency, size, size - 1, root, root, []) is ErrorCode.CORRUPT
    assert refusal(root_from_inclusion, size, size, LEAVES[0], []) is ErrorCode.CORRUPT


def refusal(check: Callable[..., object], *arguments: object) -> ErrorCode:
    """The code of the error that a call ends with."""
    with pytest.raises(HoldfastError) as caught:
        check(*arguments)
    return caught.value.code


@pytest.mark.parametrize(
    ("ask", "arguments", "code"),
    [
        (inclusion_ranges, (3, 3), ErrorCode.INVALID_ARGUMENT),
        (inclusion_ranges, (-1, 3), ErrorCode.INVALID_ARGUMENT),
        (consistency_ranges, (4, 3), ErrorCode.INVALID_ARGUMENT),
        (complete_subtrees, (1, 3), ErrorCode.INVALID_ARGUMENT),
        (Frontier, (3, (bytes(32),)), ErrorCode.CORRUPT),
        (Frontier, (1, (bytes(31),)), ErrorCode.CORRUPT),
        (Frontier, (-1, ()), ErrorCode.CORRUPT),
    ],
)
def test_what_no_tree_has(ask: Callable[..., object], arguments: tuple[object, ...], code: ErrorCode) -> None:
    assert refusal(ask, *arguments) is code


SIGNER = HeadSigner("audit-1", bytes(range(32)), "cluster-a")


def test_a_head_passes_under_its_key_alone() -> None:
    head = SIGNER.sign(size=7, root=LEAVES[0], time_unix_ms=1_800_000_000_000)
    keys = {"audit-1": SIGNER.public_key}
    HeadVerifier("cluster-a", keys).check(head)
    other = HeadSigner("audit-1", bytes(32), "cluster-a")
    assert refusal(HeadVerifier("cluster-b", keys).check, head) is ErrorCode.CORRUPT
    assert refusal(HeadVerifier("cluster-a", {"audit-1": other.public_key}).check, head) is ErrorCode.CORRUPT
    assert refusal(HeadVerifier("cluster-a", {"audit-2": SIGNER.public_key}).check, head) is ErrorCode.CORRUPT
    assert bytes(range(32)).hex() not in repr(SIGNER)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 8},
        {"time_unix_ms": 1},
        {"root": bytes(32)},
        {"root": b"short"},
        {"signature": bytes(64)},
        {"signature": b""},
        {"key_id": "audit-2"},
    ],
)
def test_a_changed_head_is_refused(change: dict[str, object]) -> None:
    head = SIGNER.sign(size=7, root=LEAVES[0], time_unix_ms=1_800_000_000_000)
    changed = SignedHead.FromString(head.SerializeToString())
    changed.MergeFrom(SignedHead(**change))  # type: ignore[arg-type]  # one field each
    if change == {"signature": b""}:
        changed.signature = b""
    assert refusal(HeadVerifier("cluster-a", {"audit-1": SIGNER.public_key}).check, changed) is ErrorCode.CORRUPT


def test_a_key_id_has_one_key() -> None:
    verifier = HeadVerifier("cluster-a", {"audit-1": SIGNER.public_key})
    verifier.trust("audit-1", SIGNER.public_key)
    other = HeadSigner("audit-1", bytes(32), "cluster-a").public_key
    assert refusal(verifier.trust, "audit-1", other) is ErrorCode.CORRUPT
    assert refusal(verifier.trust, "audit-2", b"short") is ErrorCode.CORRUPT
    assert verifier.trusts("audit-1")
    assert not verifier.trusts("audit-2")
