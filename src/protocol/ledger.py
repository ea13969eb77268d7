"""Signatures on ledger entries: the role that keeps a ledger signs the digest of every entry it writes.

A signature holds the public key beside the signature, so that a changed byte is found without knowing whose key it
is; whose it is, is for the reader to compare: with the roster of a kit, or a key that was written down. Entries of
version 1 carry none: the first signed entry after them vouches for them, as its digest covers all before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from ..errors import InvalidInput, LedgerError, SignatureError
from ..privacy.entries import Entry
from .canonical import canonical_bytes
from .signing import Signed, SigningKey, open_signed

ENTRY_KIND: Final = "ledger-entry"
CHECKPOINT_KIND: Final = "ledger-checkpoint"
_KEY_DIGITS: Final = 64


def _statement(entry: Entry) -> dict[str, str]:
    return {"digest": entry.digest}


class EntrySigner:
    """Signs the entries of one ledger, and checks that nobody else signed any of them."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    def sign(self, entry: Entry) -> str:
        """192 hex digits: the public key (32 bytes) and the signature (64 bytes) over the entry's digest."""
        signed = self._key.sign(ENTRY_KIND, _statement(entry), signer="")
        return (self._key.verify_key + signed.signature).hex()

    def attest(self, count: int, rows: str) -> str:
        """The signature, hex, on the first `count` rows of the ledger having this digest (hex): they were verified."""
        return self._key.sign(CHECKPOINT_KIND, {"entries": count, "rows": rows}, signer="").signature.hex()

    def attested(self, count: int, rows: str, signature: str) -> bool:
        """Whether this key signed that."""
        body = canonical_bytes({"entries": count, "rows": rows, "kind": CHECKPOINT_KIND})
        try:
            signed = Signed(body, "the ledger's role", bytes.fromhex(signature))
            open_signed(signed, CHECKPOINT_KIND, verify_key=self._key.verify_key)
        except (SignatureError, InvalidInput, ValueError):
            return False
        return True

    def judge(self) -> Signatures:
        """Of a whole ledger, with this key as the only one."""
        return Signatures([self._key.verify_key])


class Signatures:
    """Checks signatures entry by entry, in order: what `privacy.ledger.Replay` takes as its judge.

    Args:
        verify_keys: Ed25519 public keys (32 bytes), one of which must have signed each entry of version 2. Empty:
            signatures must hold, whoever made them, and after a signed entry none may lack one.
    """

    def __init__(self, verify_keys: Collection[bytes] = ()) -> None:
        self._keys = verify_keys
        self.signed = 0
        """Entries with a signature so far."""

    def __call__(self, entry: Entry) -> None:
        """The next entry, whose digest was verified.

        Raises:
            LedgerError: names it when its signature is missing, wrong, or by another key.
        """
        if entry.version == 1:
            return
        if entry.signature:
            _check(entry, self._keys)
            self.signed += 1
        elif self._keys or self.signed:
            raise LedgerError(f"ledger entry {entry.sequence}: it is not signed", entry=entry.sequence)


def _check(entry: Entry, verify_keys: Collection[bytes]) -> None:
    key = bytes.fromhex(entry.signature[:_KEY_DIGITS])
    signature = bytes.fromhex(entry.signature[_KEY_DIGITS:])
    body = canonical_bytes({**_statement(entry), "kind": ENTRY_KIND})
    try:
        open_signed(Signed(body, "the ledger's role", signature), ENTRY_KIND, verify_key=key)
    except (SignatureError, InvalidInput) as error:
        raise LedgerError(
            f"ledger entry {entry.sequence}: its signature does not verify", entry=entry.sequence
        ) from error
    if verify_keys and key not in verify_keys:
        raise LedgerError(
            f"ledger entry {entry.sequence}: it is signed by another key ({key.hex()[:16]}…)",
            entry=entry.sequence,
            verify_key=key.hex(),
        )


def signed_by(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The public keys, hex, that signed some of these, in the order of their first signature."""
    return tuple(dict.fromkeys(entry.signature[:_KEY_DIGITS] for entry in entries if entry.signature))
