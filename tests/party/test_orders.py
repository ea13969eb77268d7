"""A round follows from what a scientist ordered, in every field, or a party refuses it; and orders are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import Engine, MetaData

from src.aggregator.planning import plan_round as planned_by_an_aggregator
from src.communication.generated import federation_pb2, jobs_pb2
from src.communication.messages import signed_to_proto
from src.config import PartyConfig
from src.encryption.dealer import make_key_pair
from src.encryption.scheme import Scheme
from src.errors import InvalidInput, PlanError, PolicyError, SignatureError, SottoError
from src.files import make_private_directory
from src.jobs.orders import order_of
from src.jobs.plans import Model, round_plan
from src.jobs.spec import AdaptiveClipping, FederatedTrainingSpec
from src.jobs.specs import spec_into_proto
from src.party.app import App
from src.party.home import Home
from src.party.means import Means
from src.party.orders import OrderBook, Ordered, check_order
from src.privacy.accounting import epsilon
from src.privacy.entropy import SystemEntropy
from src.protocol.canonical import canonical_bytes
from src.protocol.derive import example_event
from src.protocol.keyring import Keyring
from src.protocol.order import ORDER_KIND, Order, order_time, sign_order
from src.protocol.plan import PLAN_KIND, PROTOCOL_VERSION, GradientSum, LocalPlan, NoiseSpec, RoundPlan, signed_digest
from src.protocol.roster import AGGREGATOR, Member, Roster, Scientist, sign_roster
from src.protocol.signing import Signed, SigningKey

NOW: Final = 1_800_000_000.0
NOISE: Final = 3.0
ROWS: Final = dict.fromkeys("abc", 50)
BASE: Final[dict[str, Any]] = {
    "task": "randhie",
    "rounds": 3,
    "spare_rounds": 1,
    "parties": ["a", "b", "c"],
    "quorum": 2,
    "local_training": {"epsilon": 40.0},
    "encryption": {"scheme": "plaintext"},
}
STRATEGIES: Final[dict[str, dict[str, Any]]] = {
    "fedavg": {},
    "fedavg, adapting its norm": {"party_privacy": {"adaptive_clipping": {"bit_deviation": 4.0}}},
    "fedsgd": {"strategy": "fedsgd", "local_training": {"epsilon": 40.0, "sampling_rate": 0.1}},
}
MANY: Final = tuple(f"p{number}" for number in range(20))
"""Adaptive clipping needs a quorum of so many."""


@pytest.fixture(scope="module")
def ann() -> SigningKey:
    return SigningKey.from_bytes(bytes(31) + b"n")


@pytest.fixture(scope="module")
def ordering(roster: Roster, ann: SigningKey) -> Roster:
    """The roster, in which ann may order jobs; of so many parties that a norm may adapt."""
    members = (*roster.members, *(Member(name, bytes(32), 0) for name in MANY))
    return replace(roster, members=members, scientists=(Scientist("ann", ann.verify_key),))


def make_spec(strategy: str, **changes: Any) -> FederatedTrainingSpec:
    many = {"parties": list(MANY), "quorum": 20} if "adapting" in strategy else {}
    return FederatedTrainingSpec.from_json({**BASE, **STRATEGIES[strategy], **many, **changes})


def make_order(spec: FederatedTrainingSpec, **changes: Any) -> Order:
    job = jobs_pb2.Job()
    spec_into_proto(job, spec)
    order = order_of(job, federation="demo", scientist="ann", request_id="r", expires_at=order_time(NOW))
    return replace(order, model_sha256=spec.initial_model_sha256, **changes)


def make_plan(spec: FederatedTrainingSpec, roster: Roster, scheme: Scheme, order: str, **given: Any) -> RoundPlan:
    """With any noise: how much there is, no order says."""
    return round_plan(
        spec,
        **{
            "job_id": "job",
            "number": 1,
            "model": Model("a" * 64, 100, 10),
            "roster": roster,
            "scheme": scheme,
            "noise": NOISE,
            "declared_rows": ROWS,
            "order": order,
            **given,
        },
    )


@dataclass(frozen=True)
class Case:
    """A job that ann ordered, and what a party makes of plans for it."""

    spec: FederatedTrainingSpec
    signed: Signed
    plan: RoundPlan
    roster: Roster
    scheme: Scheme

    def check(self, plan: RoundPlan, *, allow_unsigned: bool = False) -> Ordered | None:
        return check_order(
            self.signed, plan, roster=self.roster, pinned=True, scheme=self.scheme, allow_unsigned=allow_unsigned
        )


MakeCase = Callable[..., Case]


@pytest.fixture(scope="module")
def case(ordering: Roster, scheme: Scheme, ann: SigningKey) -> MakeCase:
    def make(strategy: str = "fedavg", **changes: Any) -> Case:
        spec = make_spec(strategy, **changes)
        signed = sign_order(make_order(spec), ann)
        plan = make_plan(spec, ordering, scheme, signed_digest(signed, ORDER_KIND))
        return Case(spec, signed, plan, ordering, scheme)

    return make


# --- a round follows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_round_of_what_was_ordered_follows(case: MakeCase, strategy: str) -> None:
    """Whatever model it starts from, and under adaptive clipping from whichever norm within the bounds."""
    found = case(strategy)
    for number in range(1, found.spec.priced_rounds + 1):
        adapted = 2.0 if "adapting" in strategy and number > 1 else None
        plan = make_plan(
            found.spec,
            found.roster,
            found.scheme,
            found.plan.order,
            number=number,
            model=Model(f"{number:064x}", 100, 10),
            clipping_norm=adapted,
        )
        ordered = found.check(plan)
        assert ordered is not None
        assert (ordered.order.scientist, ordered.digest, ordered.spec) == ("ann", plan.order, found.spec)


def leaves(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The fields of a specification, by path."""
    for name, field in model.model_fields.items():
        parts = [each for each in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_part(each)]
        yield from leaves(parts[0], f"{path}{name}.") if parts else [f"{path}{name}"]


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


OTHERS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "task": st.sampled_from(["other", "randhi", "randhie2"]),
    "strategy": st.sampled_from(["fedavg", "fedsgd"]),
    "trusted_aggregator": st.booleans(),
    "rounds": st.integers(1, 9),
    "spare_rounds": st.integers(0, 9),
    "parties": st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=2, max_size=4, unique=True),
    "quorum": st.integers(0, 4),
    "local_training.steps": st.integers(1, 99),
    "local_training.sampling_rate": st.floats(0.01, 1),
    "local_training.learning_rate": st.floats(0.01, 9),
    "local_training.max_grad_norm": st.floats(0.1, 9),
    "local_training.epsilon": st.floats(40, 1000),
    "local_training.delta": st.floats(1e-6, 1e-4),
    "party_privacy.clipping_norm": st.floats(0.1, 9),
    "party_privacy.noise_multiplier": st.floats(0, 9),
    "party_privacy.noise_by": st.sampled_from(["both", "parties", "aggregator"]),
    "party_privacy.delta": st.floats(1e-6, 1e-4),
    "party_privacy.adaptive_clipping.quantile": st.floats(0.1, 0.9),
    "party_privacy.adaptive_clipping.learning_rate": st.floats(0.1, 0.9),
    "party_privacy.adaptive_clipping.bit_deviation": st.floats(3, 9),
    "party_privacy.adaptive_clipping.smallest": st.floats(0.01, 0.9),
    "party_privacy.adaptive_clipping.largest": st.floats(2, 9),
    "encryption.scheme": st.just("paillier"),
    "encryption.resolution_bits": st.integers(10, 20),
    "server_optimizer.name": st.sampled_from(["fedadam", "fedavgm"]),
    "server_optimizer.learning_rate": st.floats(0.1, 9),
    "server_optimizer.momentum": st.floats(0.1, 0.9),
    "seed": st.integers(0, 99),
    "round_timeout_s": st.floats(1, 9999),
    "initial_model_sha256": st.sampled_from(["", "ab" * 32, "cd" * 32]),
    "keep": st.sampled_from(["last", "every:1", "every:3", "best:auc", "best:min:x"]),
    "continue_from.job_id": st.sampled_from(["job", "another"]),
    "continue_from.round": st.integers(1, 9),
    "continue_from.model_sha256": st.sampled_from(["ab" * 32, "cd" * 32]),
    "task_options": st.dictionaries(st.sampled_from(["x", "y"]), st.integers(0, 3)),
}
"""Of every field of a specification other values."""


def test_no_field_of_a_specification_is_forgotten_here() -> None:
    assert set(OTHERS) == set(leaves(FederatedTrainingSpec))
    assert {f"party_privacy.adaptive_clipping.{name}" for name in AdaptiveClipping.model_fields} <= set(OTHERS)


SOURCE: Final[dict[str, Any]] = {"job_id": "job", "round": 1, "model_sha256": "ab" * 32}
"""What a job goes on from, where one of its fields is to be another."""


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, tail = path.partition(".")
    if head == "continue_from":
        return {**content, head: {**SOURCE, tail: value}}
    return {**content, head: changed(content.get(head) or {}, tail, value) if tail else value}


@settings(deadline=None, max_examples=400)
@given(data=st.data(), strategy=st.sampled_from(list(STRATEGIES)), path=st.sampled_from(list(OTHERS)))
def test_with_any_field_of_the_specification_changed_between_order_and_plan_the_round_is_refused(
    case: MakeCase, data: st.DataObject, strategy: str, path: str
) -> None:
    """A plan of another job is refused, also if it says that it is the one that was ordered: unless it is, in each of
    its fields, the very round that was (what the aggregator does with the sum, say, no plan shows)."""
    found = case(strategy)
    try:
        content = changed(found.spec.to_json(), path, data.draw(OTHERS[path]))
        other = FederatedTrainingSpec.from_json(content)
        scheme = found.scheme if other.encryption.scheme == "plaintext" else None
        plan = make_plan(other, found.roster, scheme or found.scheme, found.plan.order)
    except (InvalidInput, PlanError):
        return  # there is no such job, or no round of it
    if other == found.spec:
        assert found.check(plan) is not None
        return
    with pytest.raises(PlanError):
        found.check(plan)
    disguised = replace(plan, spec_digest=found.spec.digest)
    if disguised == found.plan:
        assert found.check(disguised) is not None
    else:
        with pytest.raises(PlanError):
            found.check(disguised)


PLAN_FIELDS: Final[dict[str, Any]] = {
    "priced_rounds": 5,
    "spec_digest": "0" * 64,
    "task": "other",
    "task_options": '{"x":1}',
    "seed": 9,
    "clipping_norm": "2.0",
    "resolution_bits": 15,
    "rounded_bound": 1,
    "scheme": "paillier",
    "key_id": "k",
    "layout": {},
    "roster_digest": "0" * 64,
    "cohort": ("a", "b"),
    "quorum": 3,
    "colluders": 1,
    "threshold": 3,
    "custody": "aggregator",
    "federation": "other",
    "order": "0" * 64,
}
FREE: Final = {"job_id", "round", "model_sha256", "model_bytes", "dimension", "not_trained", "noise.noise_multiplier"}
"""What no order says: they are checked elsewhere (round and job against the book of orders, the model and what is not
trained of it by the worker, the noise by what it costs)."""


@pytest.mark.parametrize("field", [each.name for each in fields(RoundPlan)])
def test_every_field_of_a_plan_is_bound_by_the_order_or_named_here_as_free(case: MakeCase, field: str) -> None:
    """One field of the plan alone, whatever follows from it left as it is."""
    found = case("fedavg")
    parts: dict[str, Any] = {"local": LocalPlan, "noise": NoiseSpec}
    if field in FREE or field in ("gradient_sum", "adaptive_clipping"):
        return
    changes = (
        [
            {field: replace(getattr(found.plan, field), **{each.name: _another(each.name)})}
            for each in fields(parts[field])
        ]
        if field in parts
        else [{field: PLAN_FIELDS[field]}]
    )
    for change in changes:
        with pytest.raises((PlanError, SignatureError)):
            found.check(replace(found.plan, **change))


def _another(name: str) -> Any:
    """Of a part's field; noise that is next to nothing."""
    texts = {"noise_by": "parties", "share_sigma2": "1/2", "aggregator_sigma2": "1/2", "noise_multiplier": "0.01"}
    return 7 if name in ("steps", "bound") else texts.get(name, "0.015625")


def test_a_job_that_goes_on_starts_from_the_model_that_was_signed(case: MakeCase) -> None:
    """What the aggregator says that the earlier round was is nothing to a party: the digest is the scientist's word."""
    signed = Model(SOURCE["model_sha256"], 100, 10)
    found = case("fedavg", continue_from=SOURCE)
    plan = make_plan(found.spec, found.roster, found.scheme, found.plan.order, model=signed)
    ordered = found.check(plan)
    assert ordered is not None
    assert ordered.spec.continue_from is not None
    with pytest.raises(PlanError, match="does not start from the model that ann ordered"):
        found.check(replace(plan, model_sha256="cd" * 32))
    later = make_plan(found.spec, found.roster, found.scheme, found.plan.order, number=2)
    assert found.check(later) is not None  # from what was released since
    other = make_spec("fedavg", initial_model_sha256=SOURCE["model_sha256"])
    another = make_plan(other, found.roster, found.scheme, found.plan.order, model=signed)
    with pytest.raises(PlanError, match="spec_digest"):  # a job that goes on is no other job
        found.check(another)


def test_another_strategy_than_was_ordered_is_refused(case: MakeCase) -> None:
    found = case("fedavg")
    with pytest.raises(PlanError, match="gradient_sum"):
        found.check(replace(found.plan, gradient_sum=GradientSum(9, ROWS, False)))
    summed = case("fedsgd")
    with pytest.raises(PlanError):
        summed.check(replace(summed.plan, gradient_sum=None))
    trusted = replace(summed.plan.gradient_sum or GradientSum(0, {}, False), trusted_aggregator=True)
    with pytest.raises(PlanError, match="trusted_aggregator"):
        summed.check(replace(summed.plan, gradient_sum=trusted))


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
def test_the_noise_is_what_the_epsilon_that_was_ordered_needs_for_all_rounds(case: MakeCase, strategy: str) -> None:
    """More is no harm to a row; at the last bit that is enough the plan is taken, and with less it is not."""
    found = case(strategy)
    cost = epsilon([example_event(found.plan).repeated(found.spec.priced_rounds)], delta=1e-5)
    assert 0.1 < cost < 40
    local = {**STRATEGIES[strategy].get("local_training", {})}
    exact = case(strategy, local_training={**local, "epsilon": cost})
    assert exact.check(exact.plan) is not None
    less = case(strategy, local_training={**local, "epsilon": cost * (1 - 1e-9)})
    with pytest.raises(PlanError, match=r"cost a row ε .*ann ordered at most"):
        less.check(less.plan)
    more = make_plan(less.spec, less.roster, less.scheme, less.plan.order, noise=2 * NOISE)
    assert less.check(more) is not None
    none = make_plan(found.spec, found.roster, found.scheme, found.plan.order, noise=0.0)
    with pytest.raises(PlanError, match="cost a row ε inf"):
        found.check(none)


@pytest.mark.parametrize(
    ("strategy", "local"),
    [
        ("fedavg", {"epsilon": 1.0}),
        ("fedavg", {"epsilon": 0.3, "sampling_rate": 0.5, "steps": 3}),
        ("fedavg", {"epsilon": 8.0, "sampling_rate": 1.0, "delta": 1e-6}),
        ("fedsgd", {"epsilon": 1.0}),
        ("fedsgd", {"epsilon": 8.0, "sampling_rate": 1.0}),
        ("fedsgd", {"epsilon": 0.5, "sampling_rate": 0.02, "delta": 1e-7}),
    ],
)
@pytest.mark.parametrize("noise_by", ["both", "parties"])
def test_what_an_honest_aggregator_plans_for_an_order_is_enough(
    case: MakeCase, strategy: str, local: dict[str, Any], noise_by: str
) -> None:
    """It finds the noise by itself; a party computes what that costs, and it is within the ε that was ordered."""
    found = case(strategy, local_training=local, party_privacy={"noise_by": noise_by})
    plan = planned_by_an_aggregator(
        found.spec,
        job_id="job",
        number=2,
        model=Model("a" * 64, 100, 10),
        roster=found.roster,
        scheme=found.scheme,
        declared_rows=ROWS,
        order=found.plan.order,
    )
    assert found.check(plan) is not None


def test_the_first_round_starts_from_the_model_that_was_ordered(case: MakeCase) -> None:
    found = case("fedavg", initial_model_sha256="a" * 64)
    assert found.check(found.plan) is not None
    with pytest.raises(PlanError, match="does not start from the model that ann ordered"):
        found.check(replace(found.plan, model_sha256="b" * 64))
    assert found.check(replace(found.plan, round=2, model_sha256="b" * 64)) is not None


def test_the_first_norm_is_the_one_that_was_ordered(case: MakeCase) -> None:
    found = case("fedavg, adapting its norm")
    adapted = make_plan(found.spec, found.roster, found.scheme, found.plan.order, clipping_norm=2.0)
    with pytest.raises(PlanError, match="clipping_norm"):
        found.check(adapted)
    wide = replace(adapted, round=2, clipping_norm="5000.0")
    with pytest.raises(PlanError, match="bounds"):
        found.check(wide)


def test_no_round_comes_after_the_last_that_was_ordered(case: MakeCase) -> None:
    found = case("fedavg")
    assert found.check(replace(found.plan, round=4)) is not None
    with pytest.raises(PlanError, match="ann ordered at most 4 rounds, this is round 5"):
        found.check(replace(found.plan, round=5))


@pytest.mark.parametrize("allow_unsigned", [False, True])
def test_what_is_signed_has_to_be_right_also_where_unsigned_jobs_are_taken_part_in(
    case: MakeCase, allow_unsigned: bool
) -> None:
    found = case("fedavg")
    for wrong in (
        replace(found, signed=replace(found.signed, signature=bytes(64))),
        replace(found, signed=replace(found.signed, signer="bob")),
        replace(found, roster=replace(found.roster, scientists=())),
        replace(found, plan=replace(found.plan, seed=9)),
        replace(found, plan=replace(found.plan, order="")),  # an order that the plan does not name
        replace(found, plan=replace(found.plan, order="0" * 64)),
    ):
        with pytest.raises((PlanError, SignatureError)):
            wrong.check(wrong.plan, allow_unsigned=allow_unsigned)


def test_an_unsigned_job_is_taken_part_in_where_policy_says_so_and_nowhere_else(case: MakeCase) -> None:
    found = case("fedavg")
    plan = replace(found.plan, order="")
    arguments: dict[str, Any] = {"roster": found.roster, "pinned": True, "scheme": found.scheme}
    assert check_order(None, plan, **arguments, allow_unsigned=True) is None
    with pytest.raises(PolicyError, match=r"policy\.allow_unsigned_jobs"):
        check_order(None, plan, **arguments, allow_unsigned=False)
    with pytest.raises(PlanError, match="did not come with it"):
        check_order(None, found.plan, **arguments, allow_unsigned=True)


# --- without a kit ----------------------------------------------------------------------------------------------------


class Believing:
    """Party a without a kit, which has joined an aggregator that says of ann that she may order jobs; and a round of
    what "ann" ordered then."""

    def __init__(self, home: Home, aggregator: SigningKey, ann: SigningKey) -> None:
        pair = make_key_pair(512, entropy=SystemEntropy(), insecure_small=True)
        keyring = Keyring.of_private_key(pair)
        self.home = home
        self.told = Roster(
            federation="demo",
            key_id=keyring.key_id,
            custody="aggregator",
            threshold=0,
            colluders=0,
            aggregator_verify_key=aggregator.verify_key,
            members=tuple(Member(name, home.signing_key.verify_key) for name in "abc"),
            created_at="2026-01-01T00:00:00+00:00",
            scientists=(Scientist("ann", ann.verify_key),),
        )
        home.accept(
            federation_pb2.JoinResponse(
                protocol_version=PROTOCOL_VERSION,
                federation="demo",
                public_key=canonical_bytes(keyring.to_json()),
                roster=signed_to_proto(sign_roster(self.told, aggregator, signer=AGGREGATOR)),
                aggregator_verify_key=aggregator.verify_key,
                custody="aggregator",
            )
        )
        self.aggregator = aggregator
        self.signed = sign_order(make_order(make_spec("fedavg")), ann)
        digest = signed_digest(self.signed, ORDER_KIND)
        self.plan = make_plan(make_spec("fedavg"), self.told, home.scheme("plaintext"), digest)
        self.means = Means(home=home, **dict.fromkeys(("database", "memory", "blobs", "pool", "uses")))  # type: ignore[arg-type]

    async def check(self, signed: Signed | None, plan: RoundPlan) -> Ordered | None:
        """As a party does with what an assignment brings."""
        sent = self.aggregator.sign(PLAN_KIND, plan.to_statement(), signer=AGGREGATOR)
        checked = self.means.check(sent, federation_pb2.RoundName(job_id=plan.job_id, round=plan.round))
        order = signed_to_proto(signed) if signed else None
        return await self.means.check_order(federation_pb2.Contribute(order=order), checked)


@pytest.fixture
def unpinned(make_config: Callable[..., PartyConfig], tmp_path: Path) -> Callable[[bool], PartyConfig]:
    """unpinned(allow_unsigned): the configuration of a party without a kit."""

    def make(allow_unsigned: bool) -> PartyConfig:
        return make_config(
            state_dir=str(make_private_directory(tmp_path / "state")),
            keys={
                "custody": "aggregator",
                "signing_key": str(tmp_path / "state" / "signing.key"),
                "insecure_small_modulus": True,
            },
            policy={
                "allow_plaintext_scheme": True,
                "allow_unsigned_jobs": allow_unsigned,
                "allow_trusted_aggregator": True,
            },
        )

    return make


async def test_whom_an_aggregator_calls_a_scientist_orders_nothing_of_a_party_without_a_kit(
    unpinned: Callable[[bool], PartyConfig], keys: dict[str, SigningKey], ann: SigningKey
) -> None:
    """It made up ann, and her key, as it makes up jobs."""
    party = Believing(Home(unpinned(False)), keys["aggregator"], ann)
    with pytest.raises(SignatureError, match="signed by a stranger: this party has no kit"):
        await party.check(party.signed, party.plan)
    with pytest.raises(PolicyError, match=r"policy\.allow_unsigned_jobs"):
        await party.check(None, replace(party.plan, order=""))


async def test_without_a_kit_an_order_is_nobodys_where_unsigned_jobs_are_taken_part_in(
    unpinned: Callable[[bool], PartyConfig], keys: dict[str, SigningKey], ann: SigningKey
) -> None:
    """No name gets into the ledger, and the roster stays the one that plans name; what comes signed has to be right."""
    party = Believing(Home(unpinned(True)), keys["aggregator"], ann)
    assert party.home.roster.digest == party.told.digest == party.plan.roster_digest
    assert await party.check(None, replace(party.plan, order="")) is None
    assert await party.check(party.signed, party.plan) is None
    with pytest.raises(PlanError, match="seed"):
        await party.check(party.signed, replace(party.plan, seed=9))
    with pytest.raises(SignatureError):
        await party.check(replace(party.signed, signature=bytes(64)), party.plan)


@pytest.mark.parametrize(
    ("allow_unsigned", "said"),
    [(False, "every job will be refused: there is no kit"), (True, "jobs that nobody signed are taken part in")],
)
def test_a_party_without_a_kit_says_at_its_start_whose_jobs_it_takes_part_in(
    unpinned: Callable[[bool], PartyConfig], allow_unsigned: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    App(unpinned(allow_unsigned))._log_start([], [])
    assert said in caplog.text
    assert "every job will be refused" not in caplog.text or not allow_unsigned
    assert "the roster of this kit" not in caplog.text


# --- orders are counted -----------------------------------------------------------------------------------------------


class Book:
    """An order book, with every call in a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        metadata = MetaData()
        self.book, self.engine = OrderBook(metadata), engine
        metadata.create_all(engine)

    def begin(self, ordered: Ordered | None, plan: RoundPlan, *, now: float = NOW, late_s: float = 0.0) -> None:
        with self.engine.begin() as connection:
            self.book.begin(connection, ordered, plan, now=now, late_s=late_s)

    def begun(self, ordered: Ordered) -> int:
        with self.engine.begin() as connection:
            return self.book.rounds_begun(connection, ordered.digest)


@pytest.fixture
def book(engine: Engine) -> Book:
    return Book(engine)


@pytest.fixture
def ordered(case: MakeCase) -> tuple[Ordered, RoundPlan]:
    found = case("fedavg")
    checked = found.check(found.plan)
    assert checked is not None
    return checked, found.plan


def test_rounds_of_an_order_are_counted_once_each_and_never_more_than_it_says(
    book: Book, ordered: tuple[Ordered, RoundPlan]
) -> None:
    one, plan = ordered
    for number in (1, 2, 2, 1, 4, 3):
        book.begin(one, replace(plan, round=number))
    assert book.begun(one) == one.order.most_rounds == 4
    with pytest.raises(PlanError, match="the 4 rounds that ann ordered have all begun"):
        book.begin(one, replace(plan, round=5))
    book.begin(one, replace(plan, round=3))
    assert book.begun(one) == 4


def test_no_round_begins_after_the_order_has_expired(book: Book, ordered: tuple[Ordered, RoundPlan]) -> None:
    one, plan = ordered
    book.begin(one, plan, now=NOW)
    with pytest.raises(PlanError, match="the order of ann expired at 2027-01-15T08:00:00Z"):
        book.begin(one, replace(plan, round=2), now=NOW + 1)
    book.begin(one, plan, now=NOW + 10**6)  # it has begun
    book.begin(one, replace(plan, round=2), now=NOW + 60, late_s=60)
    with pytest.raises(PlanError, match="expired"):
        book.begin(one, replace(plan, round=3), now=NOW + 61, late_s=60)
    assert book.begun(one) == 2


CONFLICTS: Final[list[tuple[str, dict[str, Any], str, str]]] = [
    ("the same order as another job", {}, "job2", "this order of ann is that of job job"),
    ("another order as the same job", {"request_id": "s"}, "job", "job job rests on another order"),
    (
        "the same request as another order",
        {"expires_at": "2028-01-01T00:00:00Z"},
        "job2",
        "request 'r' of ann was ordered",
    ),
]


@pytest.mark.parametrize(
    ("changes", "job_id", "said"), [row[1:] for row in CONFLICTS], ids=[row[0] for row in CONFLICTS]
)
def test_one_order_is_one_job_and_one_request(
    book: Book, ordered: tuple[Ordered, RoundPlan], changes: dict[str, Any], job_id: str, said: str
) -> None:
    one, plan = ordered
    book.begin(one, plan)
    other = replace(one, order=replace(one.order, **changes), digest="0" * 64 if changes else one.digest)
    with pytest.raises(PlanError, match=said):
        book.begin(other, replace(plan, job_id=job_id, round=2))
    assert book.begun(one) == 1


def test_two_scientists_may_use_the_same_request_id(book: Book, ordered: tuple[Ordered, RoundPlan]) -> None:
    one, plan = ordered
    book.begin(one, plan)
    bobs = replace(one, order=replace(one.order, scientist="bob"), digest="0" * 64)
    book.begin(bobs, replace(plan, job_id="job2"))
    assert (book.begun(one), book.begun(bobs)) == (1, 1)


def test_what_nobody_signed_is_not_counted(book: Book, ordered: tuple[Ordered, RoundPlan]) -> None:
    one, plan = ordered
    book.begin(None, plan)
    assert book.begun(one) == 0


def test_what_is_refused_later_in_the_same_transaction_is_not_counted(
    book: Book, ordered: tuple[Ordered, RoundPlan]
) -> None:
    """As a round that the budget does not allow."""
    one, plan = ordered

    def refused() -> None:
        with book.engine.begin() as connection:
            book.book.begin(connection, one, plan, now=NOW)
            raise SottoError("no budget")

    with pytest.raises(SottoError, match="no budget"):
        refused()
    assert book.begun(one) == 0
    book.begin(one, replace(plan, job_id="job2"))  # nor is it bound to that job
