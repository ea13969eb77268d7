"""The public key in either custody: what is saved is what loads, and a file that holds something else says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from src.encryption.keys import KeyShare, PrivateKey, ThresholdKey
from src.errors import ConfigError, KeyMaterialError
from src.protocol.keyring import Keyring, load_private_key, load_share


@pytest.fixture(params=["threshold", "aggregator"])
def keyring(request: pytest.FixtureRequest, key: ThresholdKey, private: PrivateKey) -> Keyring:
    return Keyring(key.public, key) if request.param == "threshold" else Keyring.of_private_key(private)


def _save(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_a_key_is_read_back_in_either_custody(keyring: Keyring, tmp_path: Path) -> None:
    path = _save(tmp_path / "public_key.json", keyring.to_json())
    assert Keyring.load(path, insecure_small=True) == keyring
    assert keyring.key_id == keyring.public.key_id
    assert keyring.modulus_bits == 512


def test_both_custodies_of_one_key_share_its_id(key: ThresholdKey, private: PrivateKey) -> None:
    assert Keyring(key.public, key).key_id == Keyring.of_private_key(private).key_id


def test_a_small_modulus_needs_its_flag(keyring: Keyring, tmp_path: Path) -> None:
    path = _save(tmp_path / "public_key.json", keyring.to_json())
    with pytest.raises(KeyMaterialError, match="512 bits are too short"):
        Keyring.load(path)


def test_a_public_key_holds_nothing_secret(keyring: Keyring, private: PrivateKey, shares: list[KeyShare]) -> None:
    text = json.dumps(keyring.to_json())
    for secret in (private.p, private.q, *(share.value for share in shares)):
        assert format(int(secret), "x") not in text


def test_a_scheme_is_found_by_its_short_name(keyring: Keyring) -> None:
    for name in ("paillier", "plaintext"):
        assert keyring.scheme(name).name == name
    for unknown in ("", "masked", "Paillier", "src.encryption.plaintext"):
        with pytest.raises(ConfigError, match="is not one of paillier, plaintext"):
            keyring.scheme(unknown)


def test_a_share_and_a_key_pair_are_read_back(tmp_path: Path, shares: list[KeyShare], private: PrivateKey) -> None:
    assert load_share(_save(tmp_path / "share.json", shares[0].to_json())) == shares[0]
    path = _save(tmp_path / "private_key.json", private.to_json())
    assert load_private_key(path, insecure_small=True) == private
    with pytest.raises(KeyMaterialError, match="too short"):
        load_private_key(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", "{}", '{"kind":"threshold-key"}', "\ud800"])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    for load in (Keyring.load, load_share, load_private_key):
        with pytest.raises(KeyMaterialError):
            load(path)


def test_a_missing_file_is_a_missing_key(tmp_path: Path) -> None:
    for load in (Keyring.load, load_share, load_private_key):
        with pytest.raises(KeyMaterialError, match="does not hold"):
            load(tmp_path / "nothing.json")


def test_one_kind_of_key_is_never_taken_for_another(
    tmp_path: Path, key: ThresholdKey, private: PrivateKey, shares: list[KeyShare]
) -> None:
    public = _save(tmp_path / "public.json", key.public.to_json())
    share = _save(tmp_path / "share.json", shares[0].to_json())
    pair = _save(tmp_path / "pair.json", private.to_json())
    for load, wrong in (
        (Keyring.load, share),
        (Keyring.load, pair),
        (load_share, public),
        (load_share, pair),
        (load_private_key, public),
        (load_private_key, share),
    ):
        with pytest.raises(KeyMaterialError):
            load(wrong)
