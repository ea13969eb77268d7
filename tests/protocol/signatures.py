"""Signatures of a ledger whose chain was verified before."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from src.privacy.ledger import Entry
from src.protocol.ledger import Signatures


def check_signatures(entries: Iterable[Entry], *, verify_keys: Collection[bytes] = ()) -> int:
    """How many entries are signed; raises LedgerError as `Signatures`."""
    signatures = Signatures(verify_keys)
    for entry in entries:
        signatures(entry)
    return signatures.signed
