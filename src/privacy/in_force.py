"""Which limits are in force, and who says so, in words: what a start and `sotto budget show` tell. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from .budget import Account, Ledger, Limits, any_of
from .entries import Limit


def in_force(limits: Limits, entries: Ledger, account: Account) -> str:
    """Of one account: "dataset:randhie (example level): 10 rounds (datasets.randhie.budget), ε 4 at δ 1e-05 (…)"."""
    sources = limits.sources(entries, account)
    parts = []
    for budget in limits.budgets(entries, account):
        if budget.max_rounds is not None:
            said = _who(name for name, limit in sources.items() if limit.max_rounds == budget.max_rounds)
            parts.append(f"{budget.max_rounds} rounds{said}")
        if budget.epsilon is not None:
            pair = (budget.epsilon, budget.delta)
            said = _who(name for name, limit in sources.items() if (limit.epsilon, limit.delta) == pair)
            parts.append(f"ε {budget.epsilon:g} at δ {budget.delta:g}{said}")
    if not any(limit.max_rounds is not None for limit in sources.values()):
        parts.insert(0, "no limit in rounds")
    if not limits_epsilon(limits, entries, account):
        parts.append("no limit in ε")
    datasets = [name for name, subject in limits.datasets.items() if subject == account[1]]
    shared = f", datasets {' and '.join(datasets)} together" if len(datasets) > 1 else ""
    return f"{named(account)}{shared}: {', '.join(parts)}"


def limits_epsilon(limits: Limits, entries: Ledger, account: Account) -> bool:
    """Whether anything limits the ε of an account."""
    return any(limit.epsilon is not None for limit in limits.sources(entries, account).values())


def without_epsilon(limits: Limits, entries: Ledger, accounts: Iterable[Account]) -> list[str]:
    """A warning for each account of rows in `accounts` whose ε nothing limits."""
    return [
        f"no limit in ε is in force for {named(account)}: in time, what is trained may give a row away entirely. To "
        "have one, set privacy.budgets.example.epsilon in the configuration, or stop this role and run: "
        f"sotto budget set --config … --unit {account[0]} --subject {account[1]!r} --epsilon … --reason …"
        for account in accounts
        if account[0] == "example" and not limits_epsilon(limits, entries, account)
    ]


def without_effect(limits: Limits) -> list[str]:
    """A warning for each limit of the configuration that allows more than that of all of its kind, which holds too."""
    found = []
    for (unit, subject), limit in limits.rows.items():
        kind: Account = (unit, any_of(subject))
        wider = limits.rows.get(kind)
        if wider is not None and wider != limit and (exceeds := _exceeds(limit, wider)):
            own, its = limits.key((unit, subject)), limits.key(kind)
            found.append(f"{own} allows {exceeds}, {its} does not: the smaller holds. To allow more, raise {its}")
    return found


def named(account: Account) -> str:
    """ "dataset:randhie (example level)"."""
    unit, subject = account
    return f"{subject} ({unit} level)"


def _who(sources: Iterable[str]) -> str:
    return f" ({', '.join(sources)})"


def _exceeds(limit: Limit, wider: Limit) -> str:
    """What `limit` states and `wider` does not allow; "" for nothing."""
    if limit.max_rounds is not None and wider.max_rounds is not None and limit.max_rounds > wider.max_rounds:
        return f"{limit.max_rounds} rounds"
    comparable = limit.epsilon is not None and wider.epsilon is not None and limit.delta == wider.delta
    if comparable and limit.epsilon is not None and wider.epsilon is not None and limit.epsilon > wider.epsilon:
        return f"ε {limit.epsilon:g} at δ {limit.delta:g}"
    return ""
