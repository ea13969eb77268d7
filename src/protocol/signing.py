"""Ed25519 signatures over canonical statements (RFC 8032)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ..errors import InvalidInput, KeyMaterialError, SignatureError
from ..files import is_there, make_private_directory, write_new
from .canonical import canonical_bytes, parse_canonical


@dataclass(frozen=True, slots=True)
class Signed:
    """A canonical statement, the name of who signed it, and the signature (64 bytes)."""

    statement: bytes
    signer: str
    signature: bytes

    def to_json(self) -> dict[str, str]:
        """Strings only: the statement as text, the signature as hex."""
        return {"statement": self.statement.decode(), "signer": self.signer, "signature": self.signature.hex()}

    def to_text(self) -> str:
        """The same as one text, as stores keep it."""
        return json.dumps(self.to_json(), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str) -> Signed:
        """What `to_text` wrote; raises InvalidInput when it did not."""
        try:
            return cls.from_json(json.loads(text))
        except ValueError as error:
            raise InvalidInput("a signed statement is malformed") from error

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signed:
        """Raises InvalidInput when a field is missing or is not what `to_json` writes."""
        try:
            return cls(str(value["statement"]).encode(), str(value["signer"]), bytes.fromhex(str(value["signature"])))
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidInput("a signed statement is malformed") from error


class SigningKey:
    """An Ed25519 private key. Its `repr` shows the public half only."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, seed: bytes) -> SigningKey:
        """The key of a 32-byte seed; raises KeyMaterialError on another length."""
        if len(seed) != 32:
            raise KeyMaterialError(f"a signing key has 32 bytes, not {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key in a file that `save` wrote."""
        return cls.from_bytes(path.read_bytes())

    @classmethod
    def load_or_make(cls, path: Path) -> SigningKey:
        """The key in a file; a new one, saved there, where there is none. Raises StorageError for a link to nothing."""
        if not is_there(path):
            make_private_directory(path.parent)
            cls.generate().save(path)
        return cls.load(path)

    def save(self, path: Path) -> None:
        """Write the 32-byte seed, readable by the owner only; refuses to overwrite (FileExistsError)."""
        seed = self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        write_new(path, seed, secret=True)

    @property
    def verify_key(self) -> bytes:
        """The public half, 32 bytes."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, kind: str, statement: Mapping[str, Any], *, signer: str) -> Signed:
        """Sign a statement under its kind, which becomes a field of it: no signature is taken for another."""
        body = canonical_bytes({**statement, "kind": kind})
        return Signed(body, signer, self._key.sign(_message(kind, body)))

    def __repr__(self) -> str:
        return f"SigningKey(verify_key={self.verify_key.hex()})"


def open_signed(signed: Signed, kind: str, *, verify_key: bytes) -> dict[str, Any]:
    """The statement, once its signature verified under `verify_key` and its kind is the one asked for.

    Raises:
        SignatureError: when it does not verify or is of another kind.
        InvalidInput: when it verifies and is not canonical JSON.
    """
    try:
        Ed25519PublicKey.from_public_bytes(verify_key).verify(signed.signature, _message(kind, signed.statement))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(
            f"the signature of {signed.signer!r} on a {kind} does not verify", signer=signed.signer, kind=kind
        ) from error
    statement = parse_canonical(signed.statement)
    if statement.pop("kind", None) != kind:
        raise SignatureError(f"{signed.signer!r} signed something else than a {kind}", signer=signed.signer, kind=kind)
    return statement


def _message(kind: str, statement: bytes) -> bytes:
    return f"sotto/v1/{kind}\n".encode() + statement
