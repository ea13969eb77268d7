"""A party's two budgets: k rounds are k rounds, nothing is charged by halves, and what was sent stays spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, MetaData
from sqlalchemy.pool import StaticPool

from src.config import PartyConfig
from src.encryption.scheme import Scheme
from src.errors import BudgetError, ConflictError, LedgerError
from src.party.accounts import PartyAccounts
from src.party.rules import CheckedPlan
from src.privacy.accounting import epsilon
from src.privacy.figures import Against, figures
from src.privacy.ledger import charges
from src.protocol.canonical import finite
from src.protocol.derive import derive_again, example_event, party_event
from src.protocol.plan import RoundPlan
from src.storage.ledger import LedgerStore

MakeConfig = Callable[..., PartyConfig]
MakePlan = Callable[..., RoundPlan]
WHO: Final[tuple[Against, ...]] = ("release", "aggregator")


class Books:
    """A party's ledger in a database, with every call in a transaction of its own."""

    def __init__(self, engine: Engine, config: PartyConfig, scheme: Scheme) -> None:
        metadata = MetaData()
        self.store = LedgerStore(metadata)
        metadata.create_all(engine)
        self.accounts = PartyAccounts(self.store, config)
        self.engine, self.scheme = engine, scheme

    def reserve(self, plan: RoundPlan) -> None:
        checked = CheckedPlan(plan, "d" * 64, derive_again(self.scheme, plan).noise_plan)
        with self.engine.begin() as connection:
            self.accounts.reserve(connection, checked, now=0.0)

    def spend(self, plan: RoundPlan) -> None:
        with self.engine.begin() as connection:
            self.accounts.spend(connection, plan.job_id, plan.round, now=1.0)

    def give_back(self, plan: RoundPlan) -> None:
        with self.engine.begin() as connection:
            self.accounts.return_(connection, plan.job_id, plan.round, now=2.0, reason="x" * 1000)

    def kinds(self) -> list[str]:
        with self.engine.begin() as connection:
            self.accounts.verify(connection)
            return [f"{entry.kind} {entry.unit}" for entry in self.store.entries(connection)]

    def spent(self, unit: str) -> int:
        """Rounds that count."""
        with self.engine.begin() as connection:
            books = charges(self.store.entries(connection)).values()
        return sum(charge.entry.charged_rounds for charge in books if charge.counts and charge.entry.unit == unit)


MakeBooks = Callable[..., Books]


@pytest.fixture
def make_books(engine: Engine, make_config: MakeConfig, scheme: Scheme) -> MakeBooks:
    """make_books(example=…, party=…): the two budgets."""

    def make(**budgets: Any) -> Books:
        return Books(engine, make_config(privacy={"budgets": budgets}), scheme)

    return make


@pytest.mark.parametrize("unit", ["example", "party"])
def test_a_budget_of_k_rounds_allows_exactly_k(make_books: MakeBooks, make_plan: MakePlan, unit: str) -> None:
    budgets = {"example": {"max_rounds": 99}, "party": {"max_rounds": 99}, unit: {"max_rounds": 4}}
    books = make_books(**budgets)
    for number in range(1, 5):
        plan = make_plan(round=number, priced_rounds=4)
        books.reserve(plan)
        books.spend(plan)
    for plan in (make_plan(round=5, priced_rounds=4), make_plan(job_id="another", priced_rounds=1)):
        with pytest.raises(BudgetError, match=f"round budget at {unit} level.*spent 4, limit 4, left 0"):
            books.reserve(plan)
    assert books.spent("example") == books.spent("party") == 4


def test_a_job_that_claims_to_be_short_gets_no_more_rounds_than_the_budget(
    make_books: MakeBooks, make_plan: MakePlan
) -> None:
    books = make_books(example={"max_rounds": 99}, party={"max_rounds": 3})
    for number in range(1, 4):
        books.reserve(make_plan(round=number, priced_rounds=1))
    with pytest.raises(BudgetError):
        books.reserve(make_plan(round=4, priced_rounds=1))


OPERATIONS = st.lists(st.tuples(st.sampled_from(["reserve", "spend", "return"]), st.integers(1, 6)), max_size=25)


@settings(deadline=None, max_examples=30)
@given(operations=OPERATIONS, limit=st.integers(1, 4))
def test_whatever_happens_in_whatever_order_the_budget_holds(
    make_config: MakeConfig, make_plan: MakePlan, scheme: Scheme, operations: list[tuple[str, int]], limit: int
) -> None:
    """Against a small model: a round counts from its reservation on, unless it is given back before it is final."""
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    budgets = {"example": {"max_rounds": 99}, "party": {"max_rounds": limit}}
    books = Books(engine, make_config(privacy={"budgets": budgets}), scheme)
    state: dict[int, str] = {}
    try:
        for operation, number in operations:
            plan = make_plan(job_id=f"job{number}", priced_rounds=1)
            known = state.get(number, "")
            counted = sum(each != "returned" for each in state.values())
            if operation == "reserve" and not known:
                if counted < limit:
                    books.reserve(plan)
                    state[number] = "reserved"
                else:
                    with pytest.raises(BudgetError):
                        books.reserve(plan)
            elif operation == "reserve" and known == "returned":
                with pytest.raises(ConflictError, match="given back: a new round has a new one"):
                    books.reserve(plan)
            elif operation == "reserve":
                books.reserve(plan)  # the same again charges nothing
            elif known:
                wanted, act = ("final", books.spend) if operation == "spend" else ("returned", books.give_back)
                if known in ("reserved", wanted):
                    act(plan)
                    state[number] = wanted
                else:
                    with pytest.raises(LedgerError, match=f"is {known} and cannot become {wanted}"):
                        act(plan)
            counted = sum(each != "returned" for each in state.values())
            assert books.spent("party") == books.spent("example") == counted <= limit
    finally:
        engine.dispose()


def test_what_was_given_back_can_be_spent_by_another_round(make_books: MakeBooks, make_plan: MakePlan) -> None:
    books = make_books(example={"max_rounds": 1}, party={"max_rounds": 1})
    first, second = make_plan(priced_rounds=1), make_plan(round=2, priced_rounds=1)
    books.reserve(first)
    with pytest.raises(BudgetError):
        books.reserve(second)
    books.give_back(first)
    books.reserve(second)
    books.spend(second)
    assert books.kinds() == [
        *["reservation example", "reservation party"],
        *["returned example", "returned party"],
        *["reservation example", "reservation party"],
        *["final example", "final party"],
    ]


BUDGETS = {
    "more rounds than its party budget has": (
        {"example": {"max_rounds": 5}, "party": {"max_rounds": 4}},
        "round budget at party level of federation demo does not allow it: asked 5, spent 0, limit 4, left 4",
    ),
    "more rounds than its data's budget has": (
        {"example": {"max_rounds": 4}, "party": {"max_rounds": 5}},
        "round budget at example level of dataset randhie does not allow it: asked 5",
    ),
    "more ε than its data's budget has": (
        {"example": {"epsilon": 0.5}, "party": {"max_rounds": 5}},
        "epsilon budget at example level .*limit 0.5, left 0.5",
    ),
    "more ε than its party budget has": (
        {"example": {"max_rounds": 5}, "party": {"epsilon": 1.0}},
        "epsilon budget at party level .*limit 1, left 1",
    ),
}


@pytest.mark.parametrize(("budgets", "words"), BUDGETS.values(), ids=BUDGETS.keys())
def test_a_job_is_refused_as_a_whole_before_anything_is_charged_if_it_needs(
    make_books: MakeBooks, make_plan: MakePlan, budgets: dict[str, Any], words: str
) -> None:
    """All five rounds are priced when the first one comes, and neither budget is charged if one does not allow them."""
    books = make_books(**budgets)
    with pytest.raises(BudgetError, match=words):
        books.reserve(make_plan(priced_rounds=5))
    assert books.kinds() == []


def test_a_budget_in_epsilon_holds_the_whole_job_and_says_what_is_left(
    make_books: MakeBooks, make_plan: MakePlan, engine: Engine
) -> None:
    whole = epsilon([example_event(make_plan()).repeated(3)], delta=1e-5)
    books = make_books(example={"epsilon": whole}, party={"max_rounds": 9})
    with pytest.raises(BudgetError):
        books.reserve(make_plan(priced_rounds=4))
    for number in range(1, 4):
        books.reserve(make_plan(round=number, priced_rounds=3))
    with engine.begin() as connection:
        found = books.accounts.example_balance(connection, "randhie", delta=1e-5)
        other = books.accounts.example_balance(connection, "other task", delta=1e-5)
    assert found == (whole, 0.0, 1e-5)
    assert other == (0.0, whole, 1e-5)
    with pytest.raises(BudgetError):
        books.reserve(make_plan(round=4, priced_rounds=3))


def test_what_is_disclosed_names_its_delta_and_mixes_none(
    make_books: MakeBooks, make_plan: MakePlan, engine: Engine
) -> None:
    """Spent at the plan's δ, left at that of the limit; with limits at two δ nothing is said to be left."""
    books = make_books(example={"epsilon": 9.0, "delta": 1e-3}, party={"max_rounds": 9})
    plan = make_plan()
    with engine.begin() as connection:
        books.accounts.open(connection, now=0.0)
    books.reserve(plan)
    with engine.begin() as connection:
        found = books.accounts.example_balance(connection, "randhie", delta=1e-7)
    assert found.spent == epsilon([example_event(plan)], delta=1e-7)
    assert (found.left, found.left_delta) == (9.0 - epsilon([example_event(plan)], delta=1e-3), 1e-3)
    again = make_books(example={"epsilon": 8.0, "delta": 1e-5}, party={"max_rounds": 9})  # the ledger has the first
    with engine.begin() as connection:
        both = again.accounts.example_balance(connection, "randhie", delta=1e-7)
        assert both == (found.spent, None, None)
        free = make_books(example={"max_rounds": 9, "epsilon": None}, party={"max_rounds": 9}).accounts
        assert free.example_balance(connection, "other", delta=1e-5) == (0.0, 9.0, 1e-3)


def test_a_sum_without_party_noise_is_no_match_for_a_budget_in_epsilon(
    make_books: MakeBooks, make_plan: MakePlan
) -> None:
    books = make_books(example={"max_rounds": 9}, party={"epsilon": 1e9})
    with pytest.raises(BudgetError, match="asked ∞"):
        books.reserve(make_plan(noise_multiplier=0.0))
    assert books.kinds() == []


# --- against whom ε counts --------------------------------------------------------------------------------------------

WIDE = {"example": {"max_rounds": 99}, "party": {"max_rounds": 99}}


def test_a_row_s_limit_in_epsilon_allows_no_round_whose_noise_the_aggregator_alone_draws(
    make_books: MakeBooks, make_sum_plan: MakePlan
) -> None:
    """However small the ε that the plan states: against the aggregator it is infinite."""
    plan = make_sum_plan(noise_by="aggregator", noise_multiplier=50.0)
    books = make_books(**{**WIDE, "example": {"epsilon": 1e9}})
    with pytest.raises(BudgetError, match=r"epsilon would be ∞: it counts against the aggregator.*budgets\.against"):
        books.reserve(plan)
    assert books.kinds() == []


def test_counted_against_the_release_such_a_round_costs_what_the_release_shows_and_is_infinite_beside_it(
    make_books: MakeBooks, make_sum_plan: MakePlan, engine: Engine
) -> None:
    plan = make_sum_plan(noise_by="aggregator", priced_rounds=1)
    cost = epsilon([example_event(plan)], delta=1e-5)
    books = make_books(**{**WIDE, "example": {"epsilon": cost}}, against="release")
    books.reserve(plan)
    with engine.begin() as connection:
        assert books.accounts.example_balance(connection, "randhie", delta=1e-5) == (cost, 0.0, 1e-5)
        events = [entry.event for entry in books.store.entries(connection) if entry.unit == "example"]
    assert [each.epsilon for each in figures([each for each in events if each], unit="example", delta=1e-5)] == [
        cost,
        math.inf,
        math.inf,
    ]


def test_an_owner_who_trusts_no_more_has_the_trusted_rounds_of_the_past_on_the_books_as_infinite(
    make_books: MakeBooks, make_sum_plan: MakePlan, engine: Engine
) -> None:
    make_books(**WIDE, against="release").reserve(make_sum_plan(noise_by="aggregator", priced_rounds=1))
    books = make_books(**{**WIDE, "example": {"epsilon": 1e9}})
    with engine.begin() as connection:
        assert books.accounts.example_balance(connection, "randhie", delta=1e-5).spent == math.inf
    with pytest.raises(BudgetError, match="spent ∞"):
        books.reserve(make_sum_plan(job_id="next", priced_rounds=1))


@pytest.mark.parametrize("noise_by", ["both", "parties", "aggregator"])
def test_a_party_s_limit_in_epsilon_counts_the_noise_that_the_aggregator_cannot_take_away(
    make_books: MakeBooks, make_plan: MakePlan, scheme: Scheme, noise_by: str
) -> None:
    """What it says it drew nobody can check: only the parties' shares count, unless the owner says otherwise."""
    plan = make_plan(noise_by=noise_by, noise_multiplier=8.0, priced_rounds=1)
    noise = derive_again(scheme, plan).noise_plan
    release, aggregator = (epsilon([party_event(plan, noise, against=who)], delta=1e-5) for who in WHO)
    assert release < math.inf
    assert (release < aggregator) is (noise_by != "parties")
    books = make_books(**{**WIDE, "party": {"epsilon": min(aggregator, 1e9) * (1 - 1e-9)}})
    with pytest.raises(BudgetError, match="at party level"):
        books.reserve(plan)
    if aggregator < math.inf:
        make_books(**{**WIDE, "party": {"epsilon": aggregator * (1 + 1e-9)}}).reserve(plan)


def test_counted_against_the_release_a_party_s_limit_is_that_of_all_planned_noise(
    make_books: MakeBooks, make_plan: MakePlan, scheme: Scheme
) -> None:
    plan = make_plan(noise_by="both", noise_multiplier=8.0, priced_rounds=1)
    release = epsilon([party_event(plan, derive_again(scheme, plan).noise_plan)], delta=1e-5)
    make_books(**{**WIDE, "party": {"epsilon": release}}, against="release").reserve(plan)


def test_each_task_s_data_has_a_budget_of_its_own(make_books: MakeBooks, make_plan: MakePlan) -> None:
    books = make_books(example={"max_rounds": 1}, party={"max_rounds": 9})
    books.reserve(make_plan(priced_rounds=1))
    books.reserve(make_plan(job_id="other", priced_rounds=1, task="another"))
    with pytest.raises(BudgetError, match="example level"):
        books.reserve(make_plan(job_id="third", priced_rounds=1))


def test_the_same_round_at_another_price_is_not_charged_again(make_books: MakeBooks, make_plan: MakePlan) -> None:
    """Which plan a round has is the memory's to keep; the ledger charges a round once."""
    books = make_books(example={"max_rounds": 9}, party={"max_rounds": 9})
    plan = make_plan()
    books.reserve(plan)
    books.reserve(replace(plan, model_sha256="b" * 64))
    assert books.spent("party") == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(None, None), (0.0, 0.0), (1.5, 1.5), (float("inf"), None), (float("nan"), None)]
)
def test_only_a_finite_epsilon_travels(value: float | None, shown: float | None) -> None:
    assert finite(value) == shown


# --- quotas, and budgets of single datasets ---------------------------------------------------------------------------


def of_user(user: str | None, *, budget: dict[str, Any] | None = None) -> dict[str, Any]:
    """Datasets of which the first is that user's."""
    first = {"declared_rows": 100, **({"user": user} if user else {}), **({"budget": budget} if budget else {})}
    return {"randhie": first, "another": {"declared_rows": 100, "user": "ada"}}


@pytest.fixture
def make_own(engine: Engine, make_config: MakeConfig, scheme: Scheme) -> MakeBooks:
    """make_own(datasets, **budgets): with room for 99 rounds where nothing else is said."""

    def make(datasets: dict[str, Any], **budgets: Any) -> Books:
        wide = {"example": {"max_rounds": 99}, "party": {"max_rounds": 99}}
        return Books(engine, make_config(datasets=datasets, privacy={"budgets": {**wide, **budgets}}), scheme)

    return make


def test_a_dataset_may_have_a_budget_of_its_own(make_own: MakeBooks, make_plan: MakePlan) -> None:
    books = make_own(of_user(None, budget={"max_rounds": 1}))
    books.reserve(make_plan(priced_rounds=1))
    with pytest.raises(BudgetError, match=r"at example level of dataset randhie does not allow it.*limit 1"):
        books.reserve(make_plan(job_id="second", priced_rounds=1))


def test_a_users_quota_spans_their_datasets_and_does_not_name_them(make_own: MakeBooks, make_plan: MakePlan) -> None:
    books = make_own(of_user("ada"), users={"ada": {"max_rounds": 2}}, default_user_epsilon=1e9)
    books.reserve(make_plan(priced_rounds=1))
    books.reserve(make_plan(job_id="second", priced_rounds=1, task="another"))
    with pytest.raises(BudgetError, match="at example level of the user whose data it is does not allow it") as caught:
        books.reserve(make_plan(job_id="third", priced_rounds=1))
    assert "ada" not in caught.value.message
    assert books.spent("example") == books.spent("party") == 2
    with books.engine.begin() as connection:
        users = {entry.user for entry in books.store.entries(connection) if entry.unit == "example"}
    assert users == {"ada"}


def test_a_user_who_is_not_known_is_refused_unless_strangers_have_a_quota(
    make_own: MakeBooks, make_plan: MakePlan
) -> None:
    with pytest.raises(BudgetError, match="has no budget here") as caught:
        make_own(of_user("eve"), users={"ada": {"max_rounds": 2}}).reserve(make_plan(priced_rounds=1))
    assert "eve" not in caught.value.message
    cost = epsilon([example_event(make_plan())], delta=1e-5)
    books = make_own(of_user("eve"), default_user_epsilon=cost)
    books.reserve(make_plan(priced_rounds=1))
    with pytest.raises(BudgetError, match="epsilon budget at example level of the user"):
        books.reserve(make_plan(job_id="second", priced_rounds=1))


def test_a_user_who_was_known_by_a_default_alone_is_refused_once_the_configuration_drops_it(
    make_own: MakeBooks, make_plan: MakePlan
) -> None:
    first = make_own(of_user("eve"), default_user_epsilon=1e9)
    with first.engine.begin() as connection:
        assert first.accounts.open(connection, now=0.0) == []
    first.reserve(make_plan(priced_rounds=1))
    later = make_own(of_user("eve"))
    with later.engine.begin() as connection:
        (warning,) = later.accounts.open(connection, now=0.0)
    assert "of user:* at example level was entered as" in warning
    assert "a user who is neither named there nor by an entry of `sotto budget set` is refused" in warning
    assert "--subject 'user:NAME'" in warning
    with pytest.raises(BudgetError, match="has no budget here"):
        later.reserve(make_plan(job_id="second", priced_rounds=1))
    assert later.spent("example") == 1


@pytest.mark.parametrize("unit", ["example", "party"])
def test_a_job_has_a_quota_inside_the_budgets(make_own: MakeBooks, make_plan: MakePlan, unit: str) -> None:
    books = make_own(of_user(None), per_job={unit: {"max_rounds": 2}})
    with pytest.raises(BudgetError, match=f"round budget at {unit} level of job job does not allow it: asked 3"):
        books.reserve(make_plan(priced_rounds=3))
    for number in (1, 2):
        books.reserve(make_plan(round=number, priced_rounds=2))
    with pytest.raises(BudgetError, match="of job job does not"):
        books.reserve(make_plan(round=3, priced_rounds=2))
    books.reserve(make_plan(job_id="another", priced_rounds=2))


def test_a_budget_that_grew_in_the_configuration_alone_does_not_count_and_one_that_shrank_does(
    make_books: MakeBooks, make_plan: MakePlan
) -> None:
    """The first start enters what it finds; a later one warns, and names the command that changes it."""
    first = make_books(example={"max_rounds": 2}, party={"max_rounds": 9})
    with first.engine.begin() as connection:
        assert first.accounts.open(connection, now=0.0) == []
    assert first.kinds() == ["correction example", "correction party"]
    grown = make_books(example={"max_rounds": 3}, party={"max_rounds": 1})
    with grown.engine.begin() as connection:
        warnings = grown.accounts.open(connection, now=0.0)
        assert grown.accounts.open(connection, now=0.0) == warnings
    assert [warning.partition(":")[0] for warning in warnings] == ["the budget of dataset", "the budget of federation"]
    assert all("the smaller of both counts" in each and "sotto budget set" in each for each in warnings)
    more = "To have more, raise privacy.budgets.party in the configuration too. To enter what that says, stop"
    assert [more in each for each in warnings] == [False, True]
    assert len(grown.kinds()) == 2
    grown.reserve(make_plan(priced_rounds=1))
    with pytest.raises(BudgetError, match=r"party level.*limit 1"):
        grown.reserve(make_plan(round=2, priced_rounds=2))


def test_a_refused_round_is_entered_in_a_transaction_of_its_own(make_books: MakeBooks, make_plan: MakePlan) -> None:
    books = make_books(example={"max_rounds": 9}, party={"max_rounds": 4})
    plan = make_plan(priced_rounds=5)
    checked = CheckedPlan(plan, "d" * 64, derive_again(books.scheme, plan).noise_plan)
    with pytest.raises(BudgetError) as caught:
        books.reserve(plan)
    for _ in range(2):
        with books.engine.begin() as connection:
            books.accounts.refuse(connection, checked, caught.value, now=0.0)
    assert books.kinds() == ["refusal party"]


def test_what_was_delivered_is_entered_for_both_units(make_books: MakeBooks, make_plan: MakePlan) -> None:
    books, plan = make_books(example={"max_rounds": 9}, party={"max_rounds": 9}), make_plan()
    books.reserve(plan)
    books.spend(plan)
    with books.engine.begin() as connection:
        books.accounts.release(connection, plan.job_id, plan.round, figures={"root": "ab"}, now=0.0)
        last = books.store.entries(connection)[-2:]
    assert [(entry.kind, entry.unit, entry.figures) for entry in last] == [
        ("release", "example", (("root", "ab"),)),
        ("release", "party", (("root", "ab"),)),
    ]
