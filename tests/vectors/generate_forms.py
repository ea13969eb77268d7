"""The vectors that stand apart from any round: ledger lines, canonical JSON, reals, Merkle trees. See `generate.py`."""

from __future__ import annotations

import hashlib
import struct
from typing import Any, Final

from src.privacy import ledger
from src.privacy.events import DpSgdSteps, NoisySum
from src.protocol.canonical import canonical_bytes, digest, real
from src.protocol.merkle import MerkleHasher

Json = dict[str, Any]


def ledger_entries() -> list[ledger.Entry]:
    """One entry of every kind, with text beyond ASCII."""
    sum_event = NoisySum(noise_multiplier=0.5, rounds=1, tau=1e-300, dimension=60)
    entries = [
        ledger.open_balance(
            [],
            at="2026-01-01T00:00:00+00:00",
            unit="example",
            subject="dataset:randhie",
            reservation_id="before",
            event=DpSgdSteps(sampling_rate=0.05, noise_multiplier=1.1, steps=40),
            charged_rounds=4,
            reason="spent before this ledger: ε ≈ 1",
        )
    ]
    for number in (1, 2):
        common = {"unit": "party", "subject": "federation:vectors", "reservation_id": f"job-1/{number}"}
        entries.append(
            ledger.reserve(
                entries,
                at=f"2026-01-02T00:00:0{number}+00:00",
                job_id="job-1",
                round=number,
                event=sum_event,
                **common,  # type: ignore[arg-type]  # the literal "party" is a Unit
            )
        )
    entries.append(ledger.finalise(entries, "job-1/1", at="2026-01-02T00:01:00.250000+00:00"))
    entries.append(ledger.give_back(entries, "job-1/2", at="2026-01-02T00:02:00+00:00", reason="failed"))
    entries.append(
        ledger.refuse(
            entries,
            at="2026-01-02T00:03:00+00:00",
            job_id="job-2",
            round=None,
            unit="party",
            subject="federation:vectors",
            reservation_id="job-2",
            event=sum_event,
            reason='no "budget" left \u2028\U0001f600',
        )
    )
    return entries


def ledger_vector() -> Json:
    """Lines as `sotto budget export` writes them."""
    entries = ledger_entries()
    return {
        "format": "sotto-ledger-vector/1",
        "lines": [ledger.to_line(entry) for entry in entries],
        "head": entries[-1].digest,
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
