"""What is said of the models of released rounds: which are to be kept, and which one is meant.

Texts with one grammar each, for the wire, a job file and a command line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from ..errors import InvalidInput


class Round(Protocol):
    """A round that was released."""

    @property
    def number(self) -> int:
        """From 1."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of public rows; empty where it was not evaluated."""
        ...


R = TypeVar("R", bound=Round)

LAST: Final = "last"
_BEST: Final = "best:"
_METRIC: Final = r"((min|max):)?[A-Za-z0-9_.-]{1,64}"
CHOICE_PATTERN: Final = rf"(last|[1-9][0-9]{{0,8}}|best:{_METRIC})"
CHOICE_WORDS: Final = "the number of a round, 'last', or 'best:' and a metric"
KEEP_WORDS: Final = "'last', 'every:' and a number, or 'best:' and a metric, such as best:auc"
KEEP_PATTERN: Final = rf"(last|every:[1-9][0-9]{{0,5}}|best:{_METRIC})"

LARGER_IS_BETTER: Final = frozenset({"accuracy", "auc", "balanced_accuracy", "f1", "precision", "r2", "recall"})
SMALLER_IS_BETTER: Final = frozenset(
    {
        "brier",
        "cross_entropy",
        "deviance",
        "error",
        "log_loss",
        "loss",
        "mae",
        "mape",
        "mse",
        "nll",
        "perplexity",
        "rmse",
    }
)
"""Of any other metric somebody has to say which (`max:` or `min:`)."""
ROWS: Final = "n"
"""Stands among a task's metrics, and is none: on how many rows they were measured."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of public rows by which rounds are compared."""

    name: str
    larger: bool

    @classmethod
    def from_text(cls, value: str) -> Metric:
        """ "auc", "max:my_score", "min:my_loss". Raises ValueError where nobody can know which end is the good one."""
        direction, _, name = value.rpartition(":")
        if name == ROWS:
            raise ValueError(f"{ROWS} is the number of rows that were measured on: no round is better by it")
        if not direction and name not in LARGER_IS_BETTER | SMALLER_IS_BETTER:
            raise ValueError(f"say whether more or less of {name} is better: max:{name} or min:{name}")
        return cls(name, direction == "max" if direction else name in LARGER_IS_BETTER)

    def best(self, rows: Sequence[R]) -> R | None:
        """The best of these rounds, of several equally good ones the first; None where none has this metric."""
        found = [(row.metrics[self.name], row) for row in rows if math.isfinite(row.metrics.get(self.name, math.nan))]
        sign = 1.0 if self.larger else -1.0
        return max(found, key=lambda pair: (sign * pair[0], -pair[1].number))[1] if found else None


@dataclass(frozen=True, slots=True)
class Keep:
    """Which models of a job's released rounds stay on disk beside the last one: each `every`-th, the best by a metric,
    or none."""

    every: int = 0
    metric: Metric | None = None

    @classmethod
    def from_text(cls, value: str) -> Keep:
        """What matches `KEEP_PATTERN`. Raises ValueError as `Metric.from_text` does."""
        word, _, rest = value.partition(":")
        return cls(int(rest)) if word == "every" else cls(0, Metric.from_text(rest)) if word == "best" else cls()

    def most(self, rounds: int) -> int:
        """How many models of a job of so many rounds lie there at its end, at most."""
        return rounds // self.every + 1 if self.every else 2 if self.metric else 1


def check_keep(value: str) -> str:
    """Raises ValueError unless it says which models are kept."""
    if not re.fullmatch(KEEP_PATTERN, value):
        raise ValueError(f"must be {KEEP_WORDS} (got {value[:40]!r})")
    Keep.from_text(value)
    return value


def checked_choice(value: str) -> str:
    """Raises ValueError unless it is a choice of a released round, or by a metric whose good end nobody can know."""
    if not re.fullmatch(CHOICE_PATTERN, value):
        raise ValueError(f"must be {CHOICE_WORDS} (got {value[:40]!r})")
    if value.startswith(_BEST):
        Metric.from_text(value.removeprefix(_BEST))
    return value


def check_choice(value: str) -> str:
    """Raises InvalidInput where `checked_choice` raises ValueError."""
    try:
        return checked_choice(value)
    except ValueError as error:
        raise InvalidInput(f"round: {error}", violations={"round": str(error)}) from error
