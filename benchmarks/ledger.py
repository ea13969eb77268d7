"""What a role's ledger costs as it grows: a charge on a long one beside one on a short one, and a start."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, MetaData

from src.privacy.budget import Account, Limits
from src.privacy.entries import Entry, Limit, append, to_line
from src.privacy.events import DpSgdSteps, NoisySum
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.books import Books, Cost
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations
from src.storage.sqlite import SqliteAdapter

from .measure import Figures, cpu_s, say

SHORT: Final = 100
LONG: Final = 5000
"""Rounds that were reserved and given back, four entries each."""
TAKEN: Final = 25
"""Rounds that one run of a measurement reserves and gives back."""
AT: Final = "2026-01-01T00:00:00Z"
LATER: Final = "2027-{:02d}-01T00:00:00Z"
"""So many rounds are given back in a day; each of these is of a month of its own."""

ROWS: Final[Account] = ("example", "dataset:t")
PARTY: Final[Account] = ("party", "federation:f")
COSTS: Final = (
    Cost(account=ROWS, event=DpSgdSteps(sampling_rate=0.05, noise_multiplier=1.1, steps=10)),
    Cost(account=PARTY, event=NoisySum(noise_multiplier=0.1)),
)
LIMITS: Final = {
    ROWS: Limit(max_rounds=None, epsilon=4.0, delta=1e-5),
    PARTY: Limit(max_rounds=200, epsilon=None, delta=1e-5),
}

REACH: Final[dict[str, tuple[str, float]]] = {
    "ledger_charge_growth": ("≤", 1.3),
    "ledger_start_with_checkpoint": ("≤", 0.6),
}
"""What is to be reached: a charge on 5 000 rounds over one on 100; a start that takes over a checkpoint over one that
verifies everything."""


class _Role:
    """A ledger of so many rounds in a file."""

    def __init__(self, directory: Path, rounds: int) -> None:
        self.signer = EntrySigner(SigningKey.generate())
        self.adapter = SqliteAdapter(directory / f"{rounds}.sqlite")
        self.adapter.open(Migrations("party"))
        self._next = 0
        with self.adapter.transaction() as connection:
            _fill(connection, rounds, self.signer)
        self.books = self.begun()

    def begun(self) -> Books:
        """As a process that has just begun has it."""
        books = Books(LedgerStore(MetaData(), signer=self.signer), Limits(LIMITS))
        with self.adapter.transaction() as connection:
            books.open(connection, at=AT)
        return books

    def cycles(self) -> None:
        """Reserve and give back."""
        for _ in range(TAKEN):
            self._next += 1
            job_id, at = f"new-{self._next}", LATER.format(1 + self._next // 40)
            with self.adapter.transaction() as connection:
                self.books.reserve(connection, job_id, 1, COSTS, at=at)
            with self.adapter.transaction() as connection:
                self.books.give_back(connection, job_id, 1, at=at, reason="ended")


def _fill(connection: Connection, rounds: int, signer: EntrySigner) -> None:
    head: Entry | None = None
    lines: list[tuple[int, str, str]] = []
    for number in range(rounds):
        for kind in ("reservation", "returned"):
            for cost in COSTS:
                unit, subject = cost.account
                charged: dict[str, Any] = {"charged_rounds": 1, "event": cost.event} if kind == "reservation" else {}
                entry = append(
                    head,
                    at=AT,
                    kind=kind,  # type: ignore[arg-type]  # one of the two
                    job_id="job",
                    round=number,
                    unit=unit,
                    subject=subject,
                    reservation_id=f"job/{number}/{unit}",
                    **charged,
                )
                head = replace(entry, signature=signer.sign(entry))
                lines.append((head.sequence, head.digest, to_line(head)))
    connection.exec_driver_sql("INSERT INTO ledger (sequence, digest, line) VALUES (?, ?, ?)", lines)


def run() -> Figures:
    """Milliseconds to reserve a round and give it back, on a short and on a long ledger; seconds to start on a long."""
    with tempfile.TemporaryDirectory() as directory:
        say(f"two ledgers, of {4 * SHORT} and {4 * LONG} entries")
        short, long = _Role(Path(directory), SHORT), _Role(Path(directory), LONG)
        taken = {name: cpu_s(role.cycles) * 1e3 / TAKEN for name, role in (("short", short), ("long", long))}
        with_checkpoint = cpu_s(long.begun)

        def afresh() -> None:
            with long.adapter.transaction() as connection:
                connection.exec_driver_sql("DELETE FROM ledger_checkpoint")
            long.begun()

        without = cpu_s(afresh)
        for role in (short, long):
            role.adapter.close()
    return {
        f"ledger_charge_{SHORT}_ms": taken["short"],
        f"ledger_charge_{LONG}_ms": taken["long"],
        "ledger_charge_growth": taken["long"] / taken["short"],
        f"ledger_start_{LONG}_s": without,
        "ledger_start_with_checkpoint": with_checkpoint / without,
    }
