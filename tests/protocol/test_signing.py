"""A signature holds for one statement, of one kind, under one key: nothing else opens."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput, KeyMaterialError, SignatureError, SottoError
from src.protocol.signing import Signed, SigningKey, open_signed

KEY = SigningKey.from_bytes(bytes(range(32)))
OTHER = SigningKey.from_bytes(bytes(32))
STATEMENT = {"plan": "a" * 64, "contributors": ["a", "b"], "ciphertexts": 3, "note": "é"}
SIGNED = KEY.sign("opening", STATEMENT, signer="aggregator")


def _with(part: str, data: bytes) -> Signed:
    return replace(SIGNED, statement=data) if part == "statement" else replace(SIGNED, signature=data)


def test_rfc_8032_test_1() -> None:
    """RFC 8032, section 7.1: the secret key of test 1 has this public key."""
    key = SigningKey.from_bytes(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.verify_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


@settings(deadline=None, max_examples=50)
@given(statement=st.dictionaries(st.text(max_size=8).filter(lambda key: key != "kind"), st.text(max_size=8)))
def test_what_was_signed_is_what_opens(statement: dict[str, str]) -> None:
    signed = KEY.sign("plan", statement, signer="aggregator")
    assert open_signed(signed, "plan", verify_key=KEY.verify_key) == statement
    assert open_signed(Signed.from_json(signed.to_json()), "plan", verify_key=KEY.verify_key) == statement


@pytest.mark.parametrize("part", ["statement", "signature"])
def test_every_flipped_bit_is_detected(part: str) -> None:
    data: bytes = getattr(SIGNED, part)
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(SignatureError):
            open_signed(_with(part, bytes(flipped)), "opening", verify_key=KEY.verify_key)


@pytest.mark.parametrize("part", ["statement", "signature"])
def test_bytes_missing_or_added_are_detected(part: str) -> None:
    data: bytes = getattr(SIGNED, part)
    for changed in (b"", data[:-1], data[1:], data + b"\0", b"\0" + data, data + data):
        with pytest.raises(SignatureError):
            open_signed(_with(part, changed), "opening", verify_key=KEY.verify_key)


def test_every_flipped_bit_of_the_verification_key_is_detected() -> None:
    for position in range(256):
        flipped = bytearray(KEY.verify_key)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(SignatureError):
            open_signed(SIGNED, "opening", verify_key=bytes(flipped))


@pytest.mark.parametrize("verify_key", [b"", bytes(31), bytes(33), OTHER.verify_key])
def test_another_key_is_refused_and_the_signer_named(verify_key: bytes) -> None:
    with pytest.raises(SignatureError, match="aggregator") as caught:
        open_signed(SIGNED, "opening", verify_key=verify_key)
    assert caught.value.metadata["signer"] == "aggregator"


@pytest.mark.parametrize("kind", ["list", "plan", "", "opening\n", "Opening", "root"])
def test_a_signature_on_one_kind_is_none_on_another(kind: str) -> None:
    with pytest.raises(SignatureError):
        open_signed(SIGNED, kind, verify_key=KEY.verify_key)


def _sign_raw(kind: str, body: bytes) -> Signed:
    """A signature of KEY over any bytes, as only the owner of the key could make."""
    signature = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).sign(f"sotto/v1/{kind}\n".encode() + body)
    return Signed(body, "aggregator", signature)


def test_a_statement_that_says_it_is_of_another_kind_is_refused() -> None:
    for body in (b'{"kind":"list"}', b"{}", b'{"kind":null}'):
        with pytest.raises(SignatureError, match="something else than a opening"):
            open_signed(_sign_raw("opening", body), "opening", verify_key=KEY.verify_key)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"kind": "opening"}', b'{"kind":"opening","x":1.5}', b"\xff"])
def test_what_verifies_and_is_not_canonical_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        open_signed(_sign_raw("opening", body), "opening", verify_key=KEY.verify_key)


def test_the_kind_cannot_be_chosen_by_the_statement() -> None:
    signed = KEY.sign("opening", {**STATEMENT, "kind": "plan"}, signer="aggregator")
    assert signed == SIGNED


MALFORMED: dict[str, Any] = {
    "nothing": {},
    "no signer": {"statement": "{}", "signature": "00"},
    "no signature": {"statement": "{}", "signer": "a"},
    "no hex": {"statement": "{}", "signer": "a", "signature": "zz"},
    "half a byte": {"statement": "{}", "signer": "a", "signature": "000"},
    "a lone surrogate": {"statement": "\ud800", "signer": "a", "signature": "00"},
    "no mapping": [1],
    "null": None,
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_signed_statement_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput):
        Signed.from_json(value)


def test_a_key_is_saved_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    key = SigningKey.generate()
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).verify_key == key.verify_key
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).verify_key == key.verify_key


def test_neither_repr_nor_error_shows_the_secret_half() -> None:
    seed = bytes(range(32))
    assert KEY.verify_key.hex() in repr(KEY)
    assert seed.hex() not in repr(KEY)
    with pytest.raises(KeyMaterialError) as caught:
        SigningKey.from_bytes(seed + seed)
    assert seed.hex() not in str(caught.value)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_seed_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(SottoError):
        SigningKey.from_bytes(bytes(size))
