"""Budgets: k rounds allow exactly k, by count and by ε; a refusal says by how much."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import BudgetError, InvalidInput
from src.privacy import ledger
from src.privacy.accounting import epsilon
from src.privacy.budget import Account, Budget, Limits, balance, check_affordable, entered
from src.privacy.events import DpSgdSteps, Event, NoisySum, NonPrivate, Unit
from src.privacy.ledger import Action, Entry, Limit

AT = "2025-06-01T12:00:00Z"
DELTA = 1e-6
SUM = NoisySum(noise_multiplier=4.0, dimension=10)
STEPS = DpSgdSteps(sampling_rate=0.01, noise_multiplier=1.1, steps=20)


def budget(
    *, max_rounds: int | None = None, epsilon: float | None = None, unit: Unit = "party", subject: str = "s"
) -> Budget:
    return Budget(unit=unit, subject=subject, max_rounds=max_rounds, epsilon=epsilon, delta=DELTA)


def spend(entries: list[Entry], limit: Budget, event: Event) -> None:
    """Check, then reserve one round: what a role does in one transaction."""
    check_affordable(entries, limit, [(1, event)])
    number = len(entries) + 1
    entries.append(
        ledger.reserve(
            entries,
            at=AT,
            job_id="j",
            round=number,
            unit=limit.unit,
            subject=limit.subject,
            reservation_id=f"j/{number}",
            event=event,
        )
    )


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_a_budget_of_k_rounds_allows_exactly_k(rounds: int) -> None:
    limit, entries = budget(max_rounds=rounds), list[Entry]()
    for _ in range(rounds):
        spend(entries, limit, SUM)
    with pytest.raises(BudgetError):
        spend(entries, limit, SUM)
    left = balance(entries, limit)
    assert (left.rounds_spent, left.rounds_left) == (rounds, 0)
    assert left.epsilon_left is None
    check_affordable([], limit, [(rounds, SUM)] if rounds else [])
    with pytest.raises(BudgetError):
        check_affordable([], limit, [(rounds + 1, SUM)])


@pytest.mark.parametrize(("event", "unit"), [(SUM, "party"), (STEPS, "example")])
def test_an_epsilon_that_k_rounds_cost_allows_exactly_k(event: Event, unit: Unit) -> None:
    """To the last bit: planned as one, or spent one by one."""
    cost = epsilon([event.repeated(5)], delta=DELTA)
    limit, entries = budget(epsilon=cost, unit=unit), list[Entry]()
    check_affordable(entries, limit, [(5, event)])
    for _ in range(5):
        spend(entries, limit, event)
    with pytest.raises(BudgetError):
        spend(entries, limit, event)
    seen = balance(entries, limit)
    assert (seen.epsilon_spent, seen.epsilon_left) == (cost, 0.0)
    with pytest.raises(BudgetError):
        check_affordable([], limit, [(6, event)])


def test_a_refusal_says_asked_spent_limit_and_left() -> None:
    limit, entries = budget(max_rounds=3), list[Entry]()
    spend(entries, limit, SUM)
    with pytest.raises(BudgetError) as caught:
        check_affordable(entries, limit, [(2, SUM), (1, SUM)])
    figures = {"asked": "3", "spent": "1", "limit": "3", "left": "2"}
    assert caught.value.metadata == {"unit": "party", "subject": limit.subject, **figures}
    assert "asked 3, spent 1, limit 3, left 2" in caught.value.message
    with pytest.raises(BudgetError) as caught:
        check_affordable(entries, budget(epsilon=1.5), [(1, NonPrivate(unit="party", reason="no noise"))])
    assert caught.value.metadata["asked"] == "inf"
    assert caught.value.metadata["limit"] == "1.5"
    assert float(caught.value.metadata["spent"]) == pytest.approx(epsilon([SUM], delta=DELTA), rel=1e-5)


def test_a_request_above_what_is_left_may_fit_and_a_refusal_says_what_it_would_come_to() -> None:
    entries: list[Entry] = []
    limit = budget(epsilon=1.02 * epsilon([SUM, SUM], delta=DELTA))
    spend(entries, limit, SUM)
    left, asked = balance(entries, limit).epsilon_left, epsilon([SUM], delta=DELTA)
    assert left is not None
    assert left < asked
    check_affordable(entries, limit, [(1, SUM)])
    with pytest.raises(BudgetError) as caught:
        check_affordable(entries, limit, [(2, SUM)])
    together = epsilon([SUM] * 3, delta=DELTA)
    assert caught.value.message.endswith(f", left {left:.6g}; with it epsilon would be {together:.6g}")
    with pytest.raises(BudgetError, match=r"asked ∞, spent .*; with it epsilon would be ∞$"):
        check_affordable(entries, limit, [(1, NonPrivate(unit="party", reason="no noise"))])


def test_only_charges_of_the_same_unit_and_subject_count() -> None:
    entries: list[Entry] = []
    spend(entries, budget(), SUM)
    spend(entries, budget(subject="other"), SUM)
    spend(entries, budget(unit="example"), STEPS)
    assert balance(entries, budget()).rounds_spent == 1
    assert balance(entries, budget()).events == (SUM,)
    assert balance(entries, budget(unit="example")).events == (STEPS,)


def test_what_is_open_counts_what_is_final_counts_and_what_is_returned_does_not() -> None:
    entries: list[Entry] = []
    limit = budget(max_rounds=3)
    for _ in range(3):
        spend(entries, limit, SUM)
    entries.append(ledger.finalise(entries, "j/1", at=AT))
    assert balance(entries, limit).rounds_spent == 3
    entries.append(ledger.give_back(entries, "j/2", at=AT, reason="cancelled"))
    assert balance(entries, limit).rounds_spent == 2
    assert balance(entries, limit).rounds_left == 1


def test_an_opening_balance_and_a_round_without_noise_count() -> None:
    entries = [
        ledger.open_balance(
            [], at=AT, unit="party", subject="s", reservation_id="old", event=SUM, charged_rounds=4, reason="before"
        )
    ]
    limit = budget(max_rounds=5, epsilon=50.0)
    assert balance(entries, limit).rounds_spent == 4
    spend(entries, budget(), NonPrivate(unit="party", reason="no noise"))
    seen = balance(entries, limit)
    assert seen.epsilon_spent == math.inf
    assert (seen.epsilon_left, seen.rounds_left) == (0.0, 0)


@settings(deadline=None, max_examples=25)
@given(
    multipliers=st.lists(st.floats(1.0, 40.0), min_size=1, max_size=12),
    limit=st.floats(0.1, 10),
    rounds=st.integers(0, 9),
)
def test_a_budget_is_never_overspent(multipliers: list[float], limit: float, rounds: int) -> None:
    both, entries = budget(max_rounds=rounds, epsilon=limit), list[Entry]()
    for multiplier in multipliers:
        event = NoisySum(noise_multiplier=multiplier)
        try:
            spend(entries, both, event)
        except BudgetError:
            planned = [*balance(entries, both).events, event]
            assert len(planned) > rounds or epsilon(planned, delta=DELTA) > limit
    seen = balance(entries, both)
    assert seen.rounds_spent <= rounds
    assert seen.epsilon_spent <= limit


@pytest.mark.parametrize(
    "fields",
    [
        {"unit": "user"},
        {"max_rounds": -1},
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_a_budget_out_of_range_is_refused(fields: dict[str, object]) -> None:
    good: dict[str, object] = {"unit": "party", "subject": "s", "max_rounds": None, "epsilon": None, "delta": DELTA}
    with pytest.raises(InvalidInput):
        Budget(**{**good, **fields})  # type: ignore[arg-type]


def test_a_plan_of_another_unit_or_of_no_rounds_is_refused() -> None:
    with pytest.raises(InvalidInput):
        check_affordable([], budget(), [(1, STEPS)])
    with pytest.raises(InvalidInput):
        check_affordable([], budget(), [(0, SUM)])


# --- who an entry concerns ------------------------------------------------------------------------------------------


def charge(
    entries: list[Entry],
    number: int,
    *,
    job_id: str = "j",
    user: str = "",
    dataset: str = "d",
    event: Event = STEPS,
) -> None:
    entries.append(
        ledger.reserve(
            entries,
            at=AT,
            job_id=job_id,
            round=number,
            unit="example",
            subject=f"dataset:{dataset}",
            reservation_id=f"{job_id}/{number}/{dataset}",
            event=event,
            user=user,
        )
    )


def rounds(entries: list[Entry], subject: str, *, unit: Unit = "example", ever: bool = False) -> int:
    return balance(entries, budget(unit=unit, subject=subject), ever=ever).rounds_spent


def test_one_charge_counts_on_its_dataset_its_user_and_its_job() -> None:
    entries: list[Entry] = []
    charge(entries, 1, job_id="j1", user="ada", dataset="d1")
    charge(entries, 2, job_id="j1", user="ada", dataset="d2")
    charge(entries, 1, job_id="j2", user="bob", dataset="d1")
    charge(entries, 1, job_id="j3")
    subjects = ("dataset:d1", "dataset:d2", "dataset:d", "user:ada", "user:bob", "user:", "job:j1", "job:j3", "job:")
    assert [rounds(entries, each) for each in subjects] == [2, 1, 1, 2, 1, 0, 2, 1, 0]
    assert rounds(entries, "user:ada", unit="party") == 0


def test_a_round_counts_on_every_party_that_it_invited_and_on_all_where_nobody_is_named() -> None:
    entries: list[Entry] = []
    for number, parties in enumerate([("a", "b"), ("b", "c"), ()], start=1):
        entry = ledger.reserve(
            entries,
            at=AT,
            job_id="j",
            round=number,
            unit="party",
            subject="federation:demo",
            reservation_id=f"j/{number}",
            event=SUM,
            parties=parties,
        )
        entries.append(entry)
    entries.append(ledger.finalise(entries, "j/1", at=AT))
    assert entries[-1].parties == ("a", "b")
    subjects = ("party:a", "party:b", "party:c", "party:d", "party:*", "federation:demo", "job:j")
    assert [rounds(entries, each, unit="party") for each in subjects] == [2, 3, 2, 1, 1, 3, 3]
    assert rounds(entries, "party:a") == 0
    with pytest.raises(BudgetError, match="round budget at party level of party a does not allow it: asked 2, spent 2"):
        check_affordable(entries, budget(subject="party:a", max_rounds=3), [(2, SUM)])


def test_a_quota_is_refused_without_naming_the_user() -> None:
    entries: list[Entry] = []
    charge(entries, 1, user="ada")
    for subject, words in (("user:ada", "of the user whose data it is"), ("job:j", "of job j")):
        with pytest.raises(BudgetError, match=f"round budget at example level {words} does not allow it") as caught:
            check_affordable(entries, budget(unit="example", subject=subject, max_rounds=1), [(1, STEPS)])
        assert "ada" not in caught.value.message + str(caught.value.metadata)
    assert caught.value.metadata["subject"] == "job:j"


def test_a_refusal_names_unit_and_subject_and_a_user_to_who_keeps_the_ledger() -> None:
    for subject, words in (
        ("dataset:d", "dataset d"),
        ("federation:demo", "federation demo"),
        ("party:a", "party a"),
        ("user:ada", "user ada"),
        ("job:*", "one job"),
    ):
        limits = {"max_rounds": 1}, {"epsilon": 0.01}
        for limit, what in zip(limits, ("round", "epsilon"), strict=True):
            own = budget(unit="example", subject=subject, **limit)  # type: ignore[arg-type]  # of either kind
            with pytest.raises(BudgetError, match=f"{what} budget at example level of {words}.*asked.*left") as caught:
                check_affordable([], own, [(2, STEPS)], name_user=True)
            assert caught.value.metadata.items() >= {"unit": "example", "subject": subject}.items()
    with pytest.raises(BudgetError) as caught:
        check_affordable([], budget(unit="example", subject="user:ada", max_rounds=1), [(2, STEPS)])
    assert (caught.value.private, "subject" in caught.value.metadata) == ("the budget of user:ada", False)


def test_what_a_job_asks_at_its_own_delta_is_said_and_what_counts_is_the_budgets() -> None:
    limit = budget(unit="example", epsilon=0.01)
    with pytest.raises(BudgetError) as caught:
        check_affordable([], limit, [(2, STEPS)], stated_delta=1e-3)
    here, there = (epsilon([STEPS.repeated(2)], delta=delta) for delta in (DELTA, 1e-3))
    assert f"delta 1e-06; asked at the job's own delta 0.001: {there:.6g}" in caught.value.message
    assert f"asked {here:.6g}" in caught.value.message
    with pytest.raises(BudgetError) as caught:
        check_affordable([], limit, [(2, STEPS)], stated_delta=DELTA)
    assert "own delta" not in caught.value.message


# --- accounting periods ---------------------------------------------------------------------------------------------


def reset(entries: list[Entry], subject: str) -> None:
    entries.append(
        ledger.correct(
            entries, at=AT, unit="example", subject=subject, action="reset", limit=None, reason="new consent"
        )
    )


def test_a_reset_forgets_what_was_released_and_nothing_that_may_still_be_shown() -> None:
    """Being final is not enough: a round is shown after that."""
    entries: list[Entry] = []
    for number in range(1, 6):
        charge(entries, number)
    for number in (1, 5):
        entries.append(ledger.finalise(entries, f"j/{number}/d", at=AT))
    entries.append(ledger.release(entries, "j/1/d", at=AT, figures={}))
    entries.append(ledger.give_back(entries, "j/2/d", at=AT, reason="failed"))
    reset(entries, "dataset:d")
    assert rounds(entries, "dataset:d") == 3  # of rounds 3, 4 and 5 it is open what becomes
    entries.append(ledger.finalise(entries, "j/3/d", at=AT))
    entries.append(ledger.give_back(entries, "j/4/d", at=AT, reason="failed"))
    entries.append(ledger.release(entries, "j/5/d", at=AT, figures={}))
    assert rounds(entries, "dataset:d") == 2
    reset(entries, "dataset:d")
    assert rounds(entries, "dataset:d") == 1  # of round 3 nothing says to this day that it was shown
    assert rounds(entries, "dataset:d", ever=True) == 3
    assert rounds(entries, "job:j") == 3  # another account


def test_of_version_1_what_was_final_was_shown_as_nothing_of_it_says_releases() -> None:
    entries: list[Entry] = []
    charge(entries, 1)
    old = [replace(entries[0], version=1, digest="a"), replace(ledger.finalise(entries, "j/1/d", at=AT), version=1)]
    assert rounds(old, "dataset:d") == 1
    reset(old, "dataset:d")
    assert rounds(old, "dataset:d") == 0


def test_an_opening_balance_belongs_to_the_period_it_was_written_in() -> None:
    entries: list[Entry] = []
    for name in ("before", "after"):
        entries.append(
            ledger.open_balance(
                entries,
                at=AT,
                unit="example",
                subject="dataset:d",
                reservation_id=name,
                event=STEPS,
                charged_rounds=3,
                reason="carried over",
            )
        )
        if name == "before":
            reset(entries, "dataset:d")
    assert (rounds(entries, "dataset:d"), rounds(entries, "dataset:d", ever=True)) == (3, 6)


@settings(deadline=None, max_examples=60)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["reserve", "final", "release", "return", "reset"]), st.integers(1, 5)), max_size=25
    )
)
def test_since_a_reset_never_less_counts_than_may_have_been_shown_after_it(operations: list[tuple[str, int]]) -> None:
    entries: list[Entry] = []
    no_noise = NonPrivate(unit="example", reason="no noise")  # rounds are what counts here, and ε costs time
    state: dict[int, str] = {}
    released_since: set[int] = set()
    for operation, number in operations:
        key = f"j/{number}/d"
        if operation == "reserve" and number not in state:
            charge(entries, number, event=no_noise)
            state[number] = "open"
        elif operation == "reset":
            reset(entries, "dataset:d")
            released_since.clear()
        elif operation == "final" and state.get(number) == "open":
            entries.append(ledger.finalise(entries, key, at=AT))
            state[number] = "final"
        elif operation == "release" and state.get(number) == "final":
            entries.append(ledger.release(entries, key, at=AT, figures={}))
            state[number] = "released"
            released_since.add(number)
        elif operation == "return" and state.get(number) == "open":
            entries.append(ledger.give_back(entries, key, at=AT, reason="failed"))
            state[number] = "returned"
        may_be_shown = released_since | {each for each, now in state.items() if now in ("open", "final")}
        assert rounds(entries, "dataset:d") == len(may_be_shown)
        assert rounds(entries, "dataset:d", ever=True) == sum(each != "returned" for each in state.values())


# --- which limit is in force ------------------------------------------------------------------------------------------

RANDHIE: Account = ("example", "dataset:randhie")
ANY_DATASET: Account = ("example", "dataset:*")


def limit(max_rounds: int | None = None, epsilon: float | None = None, delta: float = DELTA) -> Limit:
    return Limit(max_rounds=max_rounds, epsilon=epsilon, delta=delta)


def enter(entries: list[Entry], account: Account, new: Limit | None, *, action: Action = "set") -> None:
    unit, subject = account
    entries.append(
        ledger.correct(entries, at=AT, unit=unit, subject=subject, action=action, limit=new, reason="because")
    )


def in_force(limits: Limits, entries: list[Entry], account: Account = RANDHIE) -> list[Limit]:
    return [each.limit for each in limits.budgets(entries, account)]


def test_a_limit_of_its_own_holds_beside_that_of_its_kind() -> None:
    limits = Limits({ANY_DATASET: limit(5), RANDHIE: limit(3)})
    assert in_force(limits, []) == [limit(3)]
    assert in_force(Limits({ANY_DATASET: limit(5), RANDHIE: limit(8)}), []) == [limit(5)]
    assert in_force(limits, [], ("example", "dataset:other")) == [limit(5)]
    assert in_force(limits, [], ("example", "user:ada")) == []
    assert in_force(limits, [], ("party", "dataset:randhie")) == []


def test_the_first_sight_of_a_limit_is_entered_once() -> None:
    limits, entries = Limits({ANY_DATASET: limit(5), RANDHIE: limit(3)}), list[Entry]()
    for account, new in limits.unentered(entries).items():
        enter(entries, account, new, action="configured")
    assert limits.unentered(entries) == {}
    assert limits.differences(entries) == {}
    assert entered(entries, RANDHIE) == limit(3)
    later = Limits({**limits.rows, ("example", "dataset:late"): limit(9), ("party", "job:*"): limit(1)})
    assert later.unentered(entries) == {("party", "job:*"): limit(1)}  # of every dataset something is entered


@pytest.mark.parametrize(
    ("written", "by_file", "expected"),
    [
        (limit(5, 1.0), limit(5, 1.0), [limit(5, 1.0)]),
        (limit(5, 1.0), limit(9, 2.0), [limit(5, 1.0)]),
        (limit(5, 1.0), limit(2, 0.5), [limit(2, 0.5)]),
        (limit(5, 1.0), limit(9, 0.5), [limit(5, 0.5)]),
        (limit(5), limit(None, 0.5), [limit(5, 0.5)]),
        (limit(5, delta=1e-9), limit(None, 0.5), [limit(5, 0.5)]),
        (limit(None, 1.0), limit(5, delta=1e-9), [limit(5, 1.0)]),
        (limit(5, 1.0, 1e-5), limit(3, 2.0, 1e-7), [limit(3, 1.0, 1e-5), limit(None, 2.0, 1e-7)]),
    ],
)
def test_of_ledger_and_configuration_the_smaller_counts_and_epsilons_at_two_deltas_are_not_mixed(
    written: Limit, by_file: Limit, expected: list[Limit]
) -> None:
    limits, entries = Limits({RANDHIE: by_file}), list[Entry]()
    enter(entries, RANDHIE, written)
    assert in_force(limits, entries) == expected
    assert limits.differences(entries) == ({} if written == by_file else {RANDHIE: (by_file, written)})


def test_an_operator_raises_a_limit_by_an_entry_and_a_reset_leaves_it() -> None:
    """That of all of its kind holds too, and is raised by an entry of its own."""
    limits, entries = Limits({ANY_DATASET: limit(9)}), list[Entry]()
    enter(entries, ANY_DATASET, limit(3), action="configured")
    assert in_force(limits, entries) == [limit(3)]
    enter(entries, RANDHIE, limit(7))
    assert in_force(limits, entries) == [limit(3)]
    enter(entries, ANY_DATASET, limit(8))
    assert in_force(limits, entries) == [limit(7)]
    assert in_force(limits, entries, ("example", "dataset:other")) == [limit(8)]
    enter(entries, RANDHIE, None, action="reset")
    assert in_force(limits, entries) == [limit(7)]


def test_what_the_configuration_no_longer_names_keeps_the_limit_that_was_entered() -> None:
    entries: list[Entry] = []
    enter(entries, RANDHIE, limit(3), action="configured")
    enter(entries, ("example", "job:j"), limit(2))
    limits = Limits({})
    assert in_force(limits, entries) == [limit(3)]
    assert limits.differences(entries) == {RANDHIE: (None, limit(3))}


def test_known_is_who_is_configured_or_was_set_by_name() -> None:
    """A default that the configuration has dropped, or a name that it has, makes nobody known any more."""
    unit: Unit = "example"
    stranger, ada, bob, eve = ((unit, f"user:{name}") for name in ("*", "ada", "bob", "eve"))
    entries: list[Entry] = []
    for account in (stranger, ada):
        enter(entries, account, limit(5), action="configured")
    enter(entries, bob, limit(2))
    enter(entries, bob, None, action="reset")
    enter(entries, eve, None, action="reset")
    enter(entries, stranger, limit(9))
    assert [Limits({}).knows(entries, each) for each in (ada, bob, eve, stranger)] == [False, True, False, False]
    assert [Limits({ada: limit(5)}).knows([], each) for each in (ada, bob, eve)] == [True, False, False]
    assert all(Limits({stranger: limit(5)}).knows([], each) for each in (ada, bob, eve))


LIMITS = st.builds(
    limit,
    st.none() | st.integers(0, 6),
    st.none() | st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.4]),
    st.sampled_from([1e-6, 1e-3]),
)
SOURCES = st.fixed_dictionaries(
    {}, optional={"own row": LIMITS, "row of all": LIMITS, "own entry": LIMITS, "entry of all": LIMITS}
)


@settings(deadline=None, max_examples=150)
@given(said=SOURCES, spent=st.integers(0, 4), asked=st.integers(1, 3))
def test_what_is_allowed_is_what_every_source_allows_by_itself(said: dict[str, Limit], spent: int, asked: int) -> None:
    """No limit, wherever it is written, is taken away by another: of its kind or its own, in file or ledger."""
    one = NoisySum(noise_multiplier=10.0)
    account: Account = ("party", "dataset:x")
    kind: Account = ("party", "dataset:*")
    limits = Limits({place: said[name] for place, name in ((account, "own row"), (kind, "row of all")) if name in said})
    entries: list[Entry] = []
    for place, name in ((kind, "entry of all"), (account, "own entry")):
        if name in said:
            enter(entries, place, said[name])
    for _ in range(spent):
        spend(entries, Budget.of(account, limit()), one)

    def allows(budget: Budget) -> bool:
        try:
            check_affordable(entries, budget, [(asked, one)])
        except BudgetError:
            return False
        return True

    together = all(allows(budget) for budget in limits.budgets(entries, account))
    assert together == all(allows(Budget.of(account, each)) for each in said.values())
    assert set(limits.sources(entries, account).values()) == set(said.values())


def test_an_epsilon_that_is_not_a_number_is_within_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.privacy.budget.composed_epsilon", lambda *_, **__: math.nan)
    with pytest.raises(BudgetError):
        check_affordable([], budget(epsilon=1e9), [(1, NoisySum(noise_multiplier=1.0))])
