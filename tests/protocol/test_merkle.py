"""Merkle roots: RFC 9162 to the letter, and nothing moves without the root moving."""

from __future__ import annotations

import hashlib
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.protocol.merkle import MerkleHasher, batch_root

# Leaves of the reference tree of Certificate Transparency, and its roots by number of leaves (google/certificate-
# transparency, merkletree tests).
REFERENCE_LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
REFERENCE_ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def root_of(leaves: list[bytes]) -> str:
    hasher = MerkleHasher()
    for leaf in leaves:
        hasher.add(leaf)
    assert hasher.leaves == len(leaves)
    return hasher.root()


def slow_root(leaves: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, as it is written."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + slow_root(leaves[:k]) + slow_root(leaves[k:])).digest()


@pytest.mark.parametrize("count", REFERENCE_ROOTS)
def test_the_roots_of_certificate_transparency(count: int) -> None:
    assert root_of(REFERENCE_LEAVES[:count]) == REFERENCE_ROOTS[count]


def test_the_root_is_the_one_of_rfc_9162_for_every_count_up_to_70() -> None:
    for count in range(71):
        leaves = [index.to_bytes(2, "big") * (index % 5) for index in range(count)]
        assert root_of(leaves) == slow_root(leaves).hex(), count


def test_a_root_can_be_asked_for_on_the_way() -> None:
    hasher = MerkleHasher()
    leaves = [bytes([index]) for index in range(20)]
    for count, leaf in enumerate(leaves):
        assert hasher.root() == slow_root(leaves[:count]).hex()
        hasher.add(leaf)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 20])
def test_no_leaf_is_changed_removed_repeated_or_moved_unnoticed(count: int) -> None:
    leaves = [f"leaf {index}".encode() for index in range(count)]
    root = root_of(leaves)
    others = [[*leaves, b""]]
    for index in range(count):
        others.append([*leaves[:index], leaves[index] + b"!", *leaves[index + 1 :]])
        others.append([*leaves[:index], b"", *leaves[index + 1 :]])
        others.append(leaves[:index] + leaves[index + 1 :])
        others.append([*leaves[:index], leaves[index], *leaves[index:]])
    for i, j in combinations(range(count), 2):
        swapped = list(leaves)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        others.append(swapped)
    roots = [root_of(other) for other in others]
    assert root not in roots
    # A repeated leaf is repeated in one place whether before or after itself; apart from that no two are alike.
    assert len(set(roots)) == len({tuple(other) for other in others})


@settings(deadline=None, max_examples=100)
@given(st.lists(st.binary(max_size=3), max_size=8), st.lists(st.binary(max_size=3), max_size=8))
def test_different_leaves_have_different_roots(one: list[bytes], other: list[bytes]) -> None:
    assert (root_of(one) == root_of(other)) == (one == other)


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    left, right = (hashlib.sha256(b"\x00" + leaf).digest() for leaf in (b"a", b"b"))
    assert root_of([left + right]) != root_of([b"a", b"b"])


@settings(deadline=None, max_examples=100)
@given(body=st.binary(max_size=60), width=st.integers(1, 9), data=st.data())
def test_how_a_body_is_cut_into_pieces_does_not_show(body: bytes, width: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    leaves = [body[start : start + width] for start in range(0, len(body), width)]
    found = batch_root(b"header", pieces, ciphertext_bytes=width)
    assert found == (root_of([b"header", *leaves]), len(leaves), len(body))


def test_the_header_is_part_of_the_root() -> None:
    roots = {batch_root(header, [b"abcd"], ciphertext_bytes=2)[0] for header in (b"", b"h", b"ab")}
    assert len(roots) == 3
    assert batch_root(b"ab", [b"cd"], ciphertext_bytes=2) != batch_root(b"abcd", [b""], ciphertext_bytes=2)


def test_a_body_cut_short_has_no_root_of_a_whole_one() -> None:
    body = bytes(range(12))
    whole = {batch_root(b"h", [body[:size]], ciphertext_bytes=4)[0] for size in range(0, 13, 4)}
    cut = {batch_root(b"h", [body[:size]], ciphertext_bytes=4)[0] for size in range(13) if size % 4}
    assert not whole & cut
