"""Signatures on ledger entries: every changed byte is found and named, and a ledger is its role's alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from src.errors import LedgerError
from src.privacy import ledger
from src.privacy.events import NoisySum
from src.privacy.ledger import Entry, to_line, verify_lines
from src.protocol.ledger import EntrySigner, signed_by
from src.protocol.signing import SigningKey
from tests.protocol.signatures import check_signatures

AT = "2026-01-01T00:00:00+00:00"
KEY = SigningKey.from_bytes(b"a".ljust(32, b"-"))
OTHER = SigningKey.from_bytes(b"b".ljust(32, b"-"))


def signed(entry: Entry, key: SigningKey = KEY) -> Entry:
    return replace(entry, signature=EntrySigner(key).sign(entry))


def reservation(book: list[Entry]) -> Entry:
    return ledger.reserve(
        book,
        at=AT,
        job_id="j",
        round=len(book),
        unit="party",
        subject="federation:demo",
        reservation_id=f"j/{len(book)}",
        event=NoisySum(noise_multiplier=1.5),
    )


@pytest.fixture
def entries() -> list[Entry]:
    """Three entries, signed."""
    book: list[Entry] = []
    for _ in range(3):
        book.append(signed(reservation(book)))
    return book


def verify(lines: list[bytes], *keys: bytes) -> int:
    """As `sotto budget verify` does it: the chain, then the signatures."""
    return check_signatures(verify_lines(lines), verify_keys=keys)


def test_signed_entries_chain_as_unsigned_ones_do_and_verify_after_their_export(entries: list[Entry]) -> None:
    lines = [to_line(entry).encode() for entry in entries]
    assert verify(lines) == verify(lines, KEY.verify_key) == verify(lines, OTHER.verify_key, KEY.verify_key) == 3
    assert signed_by(entries) == (KEY.verify_key.hex(),)


def test_every_byte_that_changes_anywhere_is_found_and_its_entry_named_without_knowing_the_key(
    entries: list[Entry],
) -> None:
    """Digests find what is in a line; the signature, which they are not over, has its own key beside it."""
    lines = [to_line(entry).encode() for entry in entries]
    for number, line in enumerate(lines, start=1):
        for position in range(len(line)):
            bent = bytearray(line)
            bent[position] ^= 1 << (position % 7)
            with pytest.raises(LedgerError) as caught:
                verify([*lines[: number - 1], bytes(bent), *lines[number:]])
            assert caught.value.metadata["entry"] == str(number)


def test_an_entry_that_another_signed_is_named(entries: list[Entry]) -> None:
    book = [*entries[:2], signed(replace(entries[2], signature=""), OTHER)]
    assert check_signatures(book) == 3  # each by somebody
    own = EntrySigner(KEY)
    for check in (
        lambda: check_signatures(book, verify_keys=[KEY.verify_key]),
        lambda: verify_lines(map(to_line, book), judge=own.judge()),
    ):
        with pytest.raises(LedgerError, match="entry 3: it is signed by another key") as caught:
            check()
        assert caught.value.metadata["entry"] == "3"
    assert signed_by(book) == (KEY.verify_key.hex(), OTHER.verify_key.hex())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_entry_that_lost_its_signature_is_named(entries: list[Entry], number: int) -> None:
    book = [replace(entry, signature="") if entry.sequence == number else entry for entry in entries]
    verify_lines(map(to_line, book))
    with pytest.raises(LedgerError, match=f"entry {number}: it is not signed"):
        check_signatures(book, verify_keys=[KEY.verify_key])
    if number > 1:
        with pytest.raises(LedgerError, match=f"entry {number}: it is not signed"):
            check_signatures(book)


def test_a_signature_belongs_to_one_entry(entries: list[Entry]) -> None:
    book = [entries[0], replace(entries[1], signature=entries[2].signature), entries[2]]
    with pytest.raises(LedgerError, match="entry 2: its signature does not verify"):
        check_signatures(book)


def test_a_ledger_rewritten_and_chained_anew_is_nobodys(entries: list[Entry]) -> None:
    cheaper = ledger.append(
        None,
        at=AT,
        kind="refusal",
        job_id="j",
        round=0,
        unit="party",
        subject="federation:demo",
        reservation_id="j/0",
    )
    verify_lines([to_line(cheaper)])
    assert check_signatures([cheaper]) == 0
    for forged in (cheaper, signed(cheaper, OTHER), replace(cheaper, signature=entries[0].signature)):
        with pytest.raises(LedgerError, match="entry 1"):
            check_signatures([forged], verify_keys=[KEY.verify_key])
