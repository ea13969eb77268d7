"""What the demonstration shows while it runs. With `--json` all of it goes to stderr."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from ..communication.generated import jobs_pb2

_COLUMNS: Final = ("round", "updates", "AUC", "ε a row, spent/left", "ε a party*", "kB up", "seconds")
_WIDTHS: Final = (5, 7, 6, 20, 11, 6, 7)


class View:
    """Lines on a console, with a note below of what is going on."""

    def __init__(self, *, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)

    def headline(self, text: str) -> None:
        """What this is."""
        self.console.print(f"[bold]{text}[/bold]")

    def say(self, text: str) -> None:
        """One fact."""
        self.console.print(f"  [green]✓[/green] {text}")

    def note(self, text: str) -> None:
        """Something to know, with less weight."""
        self.console.print(f"  [dim]{text}[/dim]")

    @contextlib.contextmanager
    def doing(self, text: str) -> Iterator[Any]:
        """Show what is going on; on a terminal as a line that moves."""
        if self.console.is_terminal:
            with self.console.status(f"[dim]{text}[/dim]") as status:
                yield lambda more: status.update(f"[dim]{text}: {more}[/dim]")
        else:
            self.console.print(f"  … {text}")
            yield lambda more: None

    def rounds_header(self) -> None:
        """The head of the table of rounds."""
        self.console.print()
        self.console.print("  " + _row(_COLUMNS), style="bold")

    def round(self, summary: jobs_pb2.RoundSummary) -> None:
        """A row for a round."""
        if summary.state != "RELEASED":
            self.console.print(f"  {summary.round:>5}  [red]{summary.state.lower()}[/red]: {summary.reason}")
            return
        auc = summary.metrics.get("auc")
        parties = summary.parties
        cells = (
            str(summary.round),
            str(summary.contributions),
            "–" if auc is None else f"{auc:.4f}",
            spent_and_left(parties),
            f"{epsilon(summary.epsilon_party)}/{epsilon(summary.epsilon_party_against_aggregator)}",
            f"{max(party.bytes_up for party in parties) / 1000:.1f}",
            f"{summary.seconds:.1f}",
        )
        self.console.print("  " + _row(cells))

    def comparison(self, rows: Sequence[tuple[str, dict[str, float], str]]) -> None:
        """The same model trained three ways."""
        table = Table(title="The same model, on the same hold-out rows", title_justify="left", title_style="bold")
        for name, justify in (("trained", "left"), ("AUC", "right"), ("accuracy", "right"), ("privacy", "left")):
            table.add_column(name, justify=justify, no_wrap=justify == "right")  # type: ignore[arg-type]  # rich's literals
        for name, metrics, privacy in rows:
            table.add_row(name, f"{metrics['auc']:.4f}", f"{metrics['accuracy']:.4f}", privacy)
        self.console.print()
        self.console.print(table)

    def failure(self, role: str, lines: Sequence[str]) -> None:
        """The end of a failing role's log."""
        self.console.print(f"\n[red]{role}[/red], last {len(lines)} lines of its log:")
        for line in lines:
            self.console.print(f"  {line}", markup=False, soft_wrap=True)


def spent_and_left(parties: Sequence[jobs_pb2.PartySummary]) -> str:
    """Each party's example-level ε; said once where it is the same for all, as public parameters alone decide it."""
    texts = {}
    for party in parties:
        spent = f"{party.example_epsilon_spent:.2f}" if party.HasField("example_epsilon_spent") else "–"
        left = f"{party.example_epsilon_left:.2f}" if party.HasField("example_epsilon_left") else "–"
        texts[party.party] = f"{spent}/{left}"
    if len(set(texts.values())) == 1:
        names = ",".join(texts) if len(texts) <= 4 else f"all {len(texts)}"
        return f"{names} {next(iter(texts.values()))}"
    return " ".join(f"{name} {text}" for name, text in texts.items())


def epsilon(value: float) -> str:
    """An ε as a person reads it."""
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _row(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, _WIDTHS, strict=True)
    return "  ".join([f"{first[0]:>{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)])
