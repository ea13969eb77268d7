"""The vectors that stand apart from any round: ledger lines, canonical JSON, reals, Merkle trees. See `generate.py`."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from src.privacy import ledger
from src.privacy.events import DpSgdSteps
from src.protocol.canonical import canonical_bytes, digest, real
from src.protocol.ledger import EntrySigner
from src.protocol.merkle import MerkleHasher
from src.protocol.signing import SigningKey

Json = dict[str, Any]


HERE: Final = Path(__file__).parent
LEDGER_KEY: Final = SigningKey.from_bytes(b"ledger vector".ljust(32, b"-"))


def ledger_entries() -> list[ledger.Entry]:
    """Lines of version 1, with text beyond ASCII: recorded when they were written, which nothing does any more."""
    return ledger.verify_lines(json.loads((HERE / "ledger.json").read_text(encoding="utf-8"))["lines"])


def ledger_vector() -> Json:
    """Lines of version 1."""
    entries = ledger_entries()
    return {
        "format": "sotto-ledger-vector/1",
        "lines": [ledger.to_line(entry) for entry in entries],
        "head": entries[-1].digest,
    }


class _Written:
    """A ledger that goes on from the lines of version 2, signed entry by entry."""

    def __init__(self) -> None:
        self.entries = ledger_entries_2()
        self._signer = EntrySigner(LEDGER_KEY)

    def add(self, entry: ledger.Entry) -> None:
        self.entries.append(replace(entry, signature=self._signer.sign(entry)))


def ledger_entries_2() -> list[ledger.Entry]:
    """Lines of version 1, and after them one of every kind of version 2: recorded as well."""
    return ledger.verify_lines(json.loads((HERE / "ledger_2.json").read_text(encoding="utf-8"))["lines"])


def ledger_vector_2() -> Json:
    """Lines of version 2, and whose signatures they carry."""
    entries = ledger_entries_2()
    return {
        "format": "sotto-ledger-vector/2",
        "lines": [ledger.to_line(entry) for entry in entries],
        "head": entries[-1].digest,
        "verify_key": LEDGER_KEY.verify_key.hex(),
    }


def ledger_entries_3() -> list[ledger.Entry]:
    """What `ledger_entries_2` has, and after it what a round comes to that a scientist ordered, one that nobody did,
    one that was refused, and a correction."""
    book = _Written()
    at = "2026-03-01T00:00:00.5+00:00"
    key, event = "job-6/1", DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=40)
    of_round: Json = {"at": at, "job_id": "job-6", "round": 1, "unit": "example", "subject": "dataset:randhie"}
    book.add(ledger.reserve(book.entries, reservation_id=key, event=event, user="ada", scientist="ann", **of_round))
    book.add(ledger.finalise(book.entries, key, at=at))
    book.add(ledger.release(book.entries, key, at=at, figures={"contributors": "3"}))
    unsigned: Json = {**of_round, "job_id": "job-7"}
    book.add(ledger.reserve(book.entries, reservation_id="job-7/1", event=event, **unsigned))
    book.add(ledger.give_back(book.entries, "job-7/1", at=at, reason="no quorum"))
    refused: Json = {**of_round, "job_id": "job-8"}
    why = "round budget"
    book.add(ledger.refuse(book.entries, reservation_id="job-8/1", event=event, reason=why, scientist="ann", **refused))
    limit = ledger.Limit(max_rounds=9, epsilon=None, delta=1e-06)
    of_account: Json = {"unit": "example", "subject": "dataset:randhie"}
    book.add(ledger.correct(book.entries, at=at, action="set", limit=limit, reason="asked for", **of_account))
    return book.entries


def ledger_vector_3() -> Json:
    """Lines as `sotto budget export` writes them, and whose signatures they carry."""
    entries = ledger_entries_3()
    return {
        "format": "sotto-ledger-vector/3",
        "lines": [ledger.to_line(entry) for entry in entries],
        "head": entries[-1].digest,
        "verify_key": LEDGER_KEY.verify_key.hex(),
    }


STATEMENTS: Final[tuple[Json, ...]] = (
    {},
    {"b": 1, "a": [True, False, None, -0, -17, 2**62, 2**100], "B": {}, "": ""},
    {"text": 'quote " backslash \\ slash / nul \x00 bell \x07 tab \t line \n\r feed \f back \b delete \x7f'},
    {"ε": "é is not e\u0301", "\u2028": "\u2029", "\ufb01": "above the surrogates", "\U0001f600": "\U0001d11e"},
    {"nested": [[], [{}], [[["x"]]]]},
)
REFUSED: Final = {
    "a space": '{"a": 1}',
    "keys out of order": '{"b":1,"a":1}',
    "a key twice": '{"a":1,"a":1}',
    "a float": '{"a":1.0}',
    "an exponent": '{"a":1e3}',
    "not a number": '{"a":NaN}',
    "minus zero": '{"a":-0}',
    "a leading zero": '{"a":01}',
    "an escape that need not be": '{"a":"\\u00e9"}',
    "an escaped slash": '{"a":"\\/"}',
    "an upper-case escape": '{"a":"\\u001F"}',
    "a long escape where there is a short one": '{"a":"\\u000a"}',
    "half of a surrogate pair": '{"a":"\\ud800"}',
    "a line feed at the end": "{}\n",
    "a list": "[]",
    "two values": "{}{}",
    "nothing": "",
}
REALS: Final = (0.1, 1e-05, 1.0, 0.05, 1 / 3, 1e16, 1e22, 123456789012345680.0, 5e-324, float("inf"))


def forms_vector() -> Json:
    """Canonical JSON, reals and Merkle trees, apart from any round."""
    trees = []
    for count in (0, 1, 2, 3, 4, 5, 7, 8, 9):
        leaves = [hashlib.sha256(bytes([i])).digest()[: i % 5] for i in range(count)]
        hasher = MerkleHasher()
        for leaf in leaves:
            hasher.add(leaf)
        trees.append({"leaves": [leaf.hex() for leaf in leaves], "root": hasher.root()})
    return {
        "format": "sotto-forms-vector/1",
        "canonical": [
            {"value": value, "text": canonical_bytes(value).decode(), "digest": digest(value, domain="vector")}
            for value in STATEMENTS
        ],
        "refused": [{"why": why, "text": text} for why, text in REFUSED.items()],
        "reals": [{"double": struct.pack(">d", value).hex(), "text": real(value)} for value in REALS],
        "trees": trees,
    }
