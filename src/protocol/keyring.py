"""The federation's public key in either custody, and the schemes that it gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encryption.keys import KeyShare, PrivateKey, PublicKey, ThresholdKey
from ..encryption.registry import scheme_for
from ..encryption.scheme import Scheme
from ..errors import KeyMaterialError


@dataclass(frozen=True, slots=True)
class Keyring:
    """The public key, with the public values of the deal where shares were dealt.

    Attributes:
        public: the Paillier public key.
        threshold_key: None in custody `aggregator`.
    """

    public: PublicKey
    threshold_key: ThresholdKey | None

    @classmethod
    def of_private_key(cls, private: PrivateKey) -> Keyring:
        """Of a key pair (custody `aggregator`)."""
        return cls(private.public, None)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, insecure_small: bool = False) -> Keyring:
        """Of the JSON form of a public or threshold key; KeyMaterialError when it is neither."""
        if value.get("kind") == "threshold-key":
            key = ThresholdKey.from_json(value, insecure_small=insecure_small)
            return cls(key.public, key)
        return cls(PublicKey.from_json(value, insecure_small=insecure_small), None)

    @classmethod
    def load(cls, path: Path, *, insecure_small: bool = False) -> Keyring:
        """From a file of a kit; KeyMaterialError when it does not hold a key."""
        try:
            value = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise KeyMaterialError(f"{path} does not hold a public key") from error
        if not isinstance(value, dict):
            raise KeyMaterialError(f"{path} does not hold a public key")
        return cls.from_json(value, insecure_small=insecure_small)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return (self.threshold_key or self.public).to_json()

    @property
    def key_id(self) -> str:
        """Names the key, and the deal where there was one."""
        return self.public.key_id

    @property
    def deal_digest(self) -> str:
        """Of all public values of the deal, what shares are verified with included; empty where nothing was dealt."""
        return self.threshold_key.digest if self.threshold_key else ""

    @property
    def modulus_bits(self) -> int:
        """Length of the modulus."""
        return self.public.modulus_bits

    def scheme(self, name: str, *, expected_ciphertexts: int | None = None) -> Scheme:
        """The scheme of that name under this key."""
        return scheme_for(
            name, self.public, threshold_key=self.threshold_key, expected_ciphertexts=expected_ciphertexts
        )


def load_share(path: Path) -> KeyShare:
    """A key share from a file of a kit; KeyMaterialError when it does not hold one."""
    try:
        return KeyShare.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise KeyMaterialError(f"{path} does not hold a key share") from error


def load_private_key(path: Path, *, insecure_small: bool = False) -> PrivateKey:
    """A key pair from the state directory of custody `aggregator`; KeyMaterialError when it does not hold one."""
    try:
        return PrivateKey.from_json(json.loads(path.read_text("utf-8")), insecure_small=insecure_small)
    except (OSError, ValueError) as error:
        raise KeyMaterialError(f"{path} does not hold a key pair") from error
