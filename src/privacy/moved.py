"""What a dataset's rows were charged on another account than theirs of today: it counts on that, too. Pure.

A dataset spends its own budget, or that of another dataset (`budget_of`), and its owner may change which. What is
unclear counts as spent: charges of its rows on any account that it had before are entered once more on the one that it
has, as opening balances, so that a change of the configuration forgets nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from .budget import Account, subject_of
from .entries import Entry
from .events import Event
from .ledger import Ledger, charges

_ROWS_OF: Final = re.compile(r"rows of dataset ([^;]+)(?:;.*)?")
_MOVED: Final = "moved/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Charges to be entered on `account`, as one opening balance."""

    account: Account
    reservation_id: str
    event: Event
    charged_rounds: int
    reason: str


def reason_of(dataset: str, account: Account, *, further: str = "") -> str:
    """Of a charge: whose rows it is for, where that is not whose account it is on; and what else there is to say."""
    rows = "" if account[1] == subject_of("dataset", dataset) else f"rows of dataset {dataset}"
    return "; ".join(text for text in (rows, further) if text)


def moved(entries: Ledger, datasets: Mapping[str, str]) -> Iterator[Moved]:
    """What is missing on the accounts that datasets have now.

    Args:
        datasets: as in `budget.Limits`: the subject of each by its name.

    Raises:
        LedgerError: `entries` break a rule.
    """
    books = [charge for charge in charges(entries).values() if charge.entry.unit == "example"]
    for dataset, subject in datasets.items():
        known = f"{_MOVED}{dataset}/to/{subject}/"
        ids = [charge.entry.reservation_id for charge in books]
        done = max((int(each[len(known) :].partition("/")[0]) for each in ids if each.startswith(known)), default=0)
        elsewhere = [
            charge.entry
            for charge in books
            if charge.counts and charge.entry.sequence > done and _is_elsewhere(charge.entry, dataset, subject)
        ]
        if not elsewhere:
            continue
        times: dict[Event, int] = {}
        rounds: dict[Event, int] = {}
        for entry in elsewhere:
            assert entry.event is not None  # of a charge
            times[entry.event] = times.get(entry.event, 0) + 1
            rounds[entry.event] = rounds.get(entry.event, 0) + entry.charged_rounds
        for number, (event, count) in enumerate(times.items()):
            yield Moved(
                account=("example", subject),
                reservation_id=f"{known}{elsewhere[-1].sequence}/{number}",
                event=event.repeated(count),
                charged_rounds=rounds[event],
                reason=f"rows of dataset {dataset}, charged before on another account",
            )


def _is_elsewhere(entry: Entry, dataset: str, subject: str) -> bool:
    if entry.subject == subject or entry.reservation_id.startswith(_MOVED):
        return False
    said = _ROWS_OF.fullmatch(entry.reason)
    return said.group(1) == dataset if said else entry.subject == subject_of("dataset", dataset)
