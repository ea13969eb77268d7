"""A party that has spent something: what `sotto budget` is asked about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData

from src import cli
from src.config import PartyConfig, load_party_config
from src.config_budgets import party_limits
from src.privacy.events import DpSgdSteps, Event, NoisySum
from src.protocol.ledger import EntrySigner
from src.protocol.signing import SigningKey
from src.storage.books import Books, Cost
from src.storage.database import Database
from src.storage.ledger import LedgerStore
from src.storage.migrations import Migrations

AT = "2026-01-01T00:00:00Z"
STEPS = DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=40)
SUM = NoisySum(noise_multiplier=4.0)
CONFIG = """
version: 1
name: a
federation: demo
state_dir: state
server: {insecure: true}
keys: {custody: aggregator}
datasets: {randhie: {declared_rows: 100}}
privacy: {budgets: {example: {epsilon: 4.0}, party: {max_rounds: 9}, default_user_epsilon: 10.0}}
"""
RANDHIE = ("--unit", "example", "--subject", "dataset:randhie")


@dataclass
class Role:
    """A party that has run one round of job j, for a row of ada's."""

    file: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def config(self) -> PartyConfig:
        return load_party_config(self.file)

    @property
    def key(self) -> SigningKey:
        return SigningKey.load_or_make(self.config.keys.signing_key)

    def books(self) -> Books:
        return Books(LedgerStore(MetaData(), signer=EntrySigner(self.key)), party_limits(self.config))

    def write(self, *work: Callable[[Connection], Any]) -> None:
        async def run() -> None:
            database = Database(self.config.database_path, Migrations("party"))
            await database.open()
            for each in work:
                await database.run(each)
            await database.close()

        asyncio.run(run())

    def spend(self, number: int, job_id: str = "j", *, whole: Event = SUM, scientist: str = "") -> None:
        books = self.books()
        example = Cost(account=("example", "dataset:randhie"), event=STEPS, user="ada", scientist=scientist)
        party = Cost(account=("party", "federation:demo"), event=whole, scientist=scientist)
        self.write(
            lambda c: books.open(c, at=AT),
            lambda c: books.reserve(c, job_id, number, [example, party], at=AT),
            lambda c: books.spend(c, job_id, number, at=AT, reason="the upload begins"),
        )

    def release(self, number: int) -> None:
        books = self.books()
        self.write(lambda c: books.release(c, "j", number, figures={}, at=AT))

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self.capsys.readouterr()
        code = cli.run(["budget", *arguments])
        done = self.capsys.readouterr()
        return code, done.out, done.err

    def read(self, command: str, *arguments: str) -> dict[str, Any]:
        """What the command prints as JSON."""
        code, out, err = self.run(command, "--config", str(self.file), "--json", *arguments)
        assert (code, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    def change(self, command: str, *arguments: str) -> dict[str, Any]:
        return self.read(command, "--reason", "the ethics board, minutes of 3 May", *arguments)

    def row(self, subject: str = "dataset:randhie") -> dict[str, Any]:
        (row,) = self.read("show", "--unit", "example", "--subject", subject)["budgets"]
        found: dict[str, Any] = row
        return found
