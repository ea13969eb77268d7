"""The budgets that a role's configuration sets, by account: what `privacy.budget.Limits` compares with the ledger."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .config import AggregatorConfig, PartyConfig
from .config_sections import AggregatorPrivacy, Budget
from .privacy.budget import ANY, Account, Limits, subject_of
from .privacy.events import Unit
from .privacy.figures import Against
from .privacy.ledger import Limit


def aggregator_limits(privacy: AggregatorPrivacy, *, federation: str) -> Limits:
    """The federation's party-level budget, those of its parties, and the quota of any one job."""
    return _limits(
        {
            ("party", subject_of("federation", federation)): ("privacy.budget", privacy.budget),
            ("party", subject_of("party", ANY)): ("privacy.per_party", privacy.per_party),
            **{
                ("party", subject_of("party", name)): (f"privacy.parties.{name}", budget)
                for name, budget in privacy.parties.items()
            },
            ("party", subject_of("job", ANY)): ("privacy.per_job", privacy.per_job),
        }
    )


def party_limits(config: PartyConfig) -> Limits:
    """Of its datasets, of the party in its federation, and the quotas of users and jobs.

    A user without a row is one whom this party does not know: nothing of theirs is trained on.
    """
    budgets = config.privacy.budgets
    stranger = budgets.default_user_epsilon
    return _limits(
        {
            ("example", subject_of("dataset", ANY)): ("privacy.budgets.example", budgets.example),
            **{
                ("example", subject_of("dataset", task)): (f"datasets.{task}.budget", each.budget)
                for task, each in config.datasets.items()
            },
            ("party", subject_of("federation", config.federation)): ("privacy.budgets.party", budgets.party),
            ("example", subject_of("user", ANY)): (
                "privacy.budgets.default_user_epsilon",
                None if stranger is None else Budget(epsilon=stranger, delta=budgets.default_user_delta),
            ),
            **{
                ("example", subject_of("user", name)): (f"privacy.budgets.users.{name}", budget)
                for name, budget in budgets.users.items()
            },
            ("example", subject_of("job", ANY)): ("privacy.budgets.per_job.example", budgets.per_job.example),
            ("party", subject_of("job", ANY)): ("privacy.budgets.per_job.party", budgets.per_job.party),
        },
        datasets={task: subject_of("dataset", each.budget_of or task) for task, each in config.datasets.items()},
        against=budgets.against,
    )


def limits_of(config: AggregatorConfig | PartyConfig) -> Limits:
    """Of either role."""
    if isinstance(config, AggregatorConfig):
        return aggregator_limits(config.privacy, federation=config.federation)
    return party_limits(config)


def enforced(config: AggregatorConfig | PartyConfig | None) -> dict[Unit, dict[str, frozenset[str] | None]]:
    """The kinds of subjects that a role counts charges on, by unit, with their names where it counts on no others.

    The aggregator knows rounds, whom they invite and for which job; a party its datasets' rows, whose these are, for
    which job, and itself as a whole; `sotto train` without a configuration users and jobs.
    """
    if config is None:
        return {"example": {"user": None, "job": None}}
    own = frozenset({config.federation})
    if isinstance(config, AggregatorConfig):
        return {"party": {"federation": own, "party": None, "job": None}}
    return {
        "example": {"dataset": frozenset({*_spent_by_datasets(config), ANY}), "user": None, "job": None},
        "party": {"federation": own, "job": None},
    }


def _spent_by_datasets(config: PartyConfig) -> set[str]:
    """The datasets whose budgets are spent: all that do not spend another's."""
    return {each.budget_of or task for task, each in config.datasets.items()}


def apart(config: PartyConfig) -> list[str]:
    """A warning for datasets that may hold the same rows or people, and have no budget in common.

    What their options name alike is said first; the values of options are private, and not said.
    """
    alone = sorted(_spent_by_datasets(config))
    if len(alone) < 2:
        return []
    found = []
    for one, other in itertools.combinations(alone, 2):
        alike = _alike(config.datasets[one].options, config.datasets[other].options)
        if alike:
            found.append(
                f"datasets {one} and {other} have the same {alike}: a row that both hold has two budgets, and is "
                f"protected by neither. One budget for both: datasets.{other}.budget_of: {one}"
            )
    return found or [
        f"datasets {', '.join(alone)} have a budget each: whoever has rows in several of them spends several budgets. "
        f"Where they hold the same rows or people, set budget_of, such as datasets.{alone[1]}.budget_of: {alone[0]}"
    ]


def _alike(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """Which options name the same data: all of them, or any that is the same file; "" for none."""
    if one and one == other:
        return "options"
    for name, value in _leaves(one):
        same = [key for key, its in _leaves(other) if _is_same_file(value, its)]
        if same:
            return f"file ({name})" if same[0] == name else f"file ({name}, {same[0]})"
    return ""


def _leaves(options: object, at: str = "") -> Iterator[tuple[str, object]]:
    """What lists and mappings of options hold, with the path to it."""
    if not isinstance(options, Mapping | list):
        yield at, options
        return
    inner = options.items() if isinstance(options, Mapping) else enumerate(options)
    for key, value in inner:
        yield from _leaves(value, f"{at}.{key}" if at else str(key))


def _is_same_file(one: object, other: object) -> bool:
    if not isinstance(one, str) or not isinstance(other, str) or not one or not other:
        return False
    with suppress(OSError, ValueError):
        return Path(one).samefile(other)
    return os.sep in one and os.path.normpath(one) == os.path.normpath(other)


def _limits(
    sections: dict[Account, tuple[str, Budget | None]],
    *,
    datasets: dict[str, str] | None = None,
    against: Against = "release",
) -> Limits:
    """Args: sections: each with its path in the configuration. datasets, against: as in `Limits`."""
    rows = {account: limit_of(section) for account, (_, section) in sections.items() if section is not None}
    keys = {account: sections[account][0] for account in rows}
    return Limits(rows, keys=keys, datasets=datasets or {}, against=against)


def limit_of(section: Budget) -> Limit:
    """What a section of the configuration says, as the ledger has it."""
    return Limit(max_rounds=section.max_rounds, epsilon=section.epsilon, delta=section.delta)
