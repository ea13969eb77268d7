"""The round plan and the statements that name it: read back as written, read strictly, and all of it signed for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.encryption.scheme import Scheme
from src.errors import InvalidInput
from src.protocol.canonical import canonical_bytes, digest, parse_canonical
from src.protocol.plan import (
    LocalPlan,
    NoiseSpec,
    OpeningStatement,
    RootStatement,
    RoundPlan,
    aggregate_header,
    share_binding,
    signed_digest,
)
from src.protocol.signing import SigningKey

MakePlan = Callable[..., RoundPlan]
KEY = SigningKey.from_bytes(bytes(range(32)))
ROOT = RootStatement("p" * 64, "a", "r" * 64, ciphertexts=3, body_bytes=384, proof="", ledger_head="1" * 64)
OPENING = OpeningStatement(plan="p" * 64, list="l" * 64, contributors=("a", "b"), aggregate_root="r" * 64)


@pytest.fixture(scope="module")
def plan(make_plan: MakePlan, paillier: Scheme) -> RoundPlan:
    return make_plan(paillier)


@settings(deadline=None, max_examples=25)
@given(
    dimension=st.integers(1, 500),
    clipping_norm=st.floats(0.01, 100),
    noise_by=st.sampled_from(["both", "parties", "aggregator"]),
    noise_multiplier=st.floats(0.1, 5),
    parties=st.integers(2, 8),
)
def test_a_plan_is_read_back_from_its_signed_statement(
    make_plan: MakePlan, paillier: Scheme, dimension: int, parties: int, **rest: Any
) -> None:
    plan = make_plan(paillier, dimension=dimension, parties=parties, **rest)
    assert RoundPlan.from_statement(parse_canonical(canonical_bytes(plan.to_statement()))) == plan


# One other value for each field, of the right type: what a dishonest aggregator might want to have signed instead.
OTHERS: dict[str, Any] = {
    "federation": "other",
    "job_id": "job2",
    "round": 2,
    "priced_rounds": 6,
    "spec_digest": "6" * 64,
    "task": "other",
    "task_options": '{"a":1}',
    "seed": 8,
    "model_sha256": "c" * 64,
    "model_bytes": 101,
    "dimension": 11,
    "clipping_norm": "2.0",
    "resolution_bits": 17,
    "rounded_bound": 1,
    "scheme": "plaintext",
    "key_id": "other",
    "layout": {},
    "roster_digest": "d" * 64,
    "cohort": ["party0", "party1"],
    "quorum": 3,
    "colluders": 1,
    "threshold": 3,
    "custody": "aggregator",
    **{f"local.{name}": "0.5" for name in ("sampling_rate", "learning_rate", "max_grad_norm", "noise_multiplier")},
    "local.steps": 11,
    "local.delta": "1e-06",
    "noise.noise_by": "parties",
    "noise.noise_multiplier": "0.25",
    "noise.share_sigma2": "1/2",
    "noise.aggregator_sigma2": "0/1",
    "noise.bound": 1,
    "noise.delta": "1e-06",
}


def _with(statement: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, tail = path.partition(".")
    return {**statement, head: {**statement[head], tail: value} if tail else value}


def _paths() -> list[str]:
    parts = {"local": LocalPlan, "noise": NoiseSpec}
    # What only some plans have is below, in test_gradient_sum.py and in test_adaptive_clipping.py.
    optional = {"gradient_sum", "adaptive_clipping", "order", "not_trained"}
    whole = [each.name for each in fields(RoundPlan) if each.name not in {*parts, *optional}]
    return whole + [f"{part}.{each.name}" for part, cls in parts.items() for each in fields(cls)]


@pytest.mark.parametrize("path", _paths())
def test_another_value_of_any_field_is_another_plan(plan: RoundPlan, path: str) -> None:
    statement = plan.to_statement()
    changed = _with(statement, path, OTHERS[path])
    assert RoundPlan.from_statement(changed) != plan
    signed, other = (KEY.sign("plan", each, signer="aggregator") for each in (statement, changed))
    assert signed_digest(signed, "plan") != signed_digest(other, "plan")


@pytest.mark.parametrize("path", _paths())
def test_a_plan_without_a_field_or_with_another_type_in_it_is_refused(plan: RoundPlan, path: str) -> None:
    statement = plan.to_statement()
    head, _, tail = path.partition(".")
    part = statement[head] if tail else statement
    missing = {name: value for name, value in part.items() if name != (tail or head)}
    wrong: list[dict[str, Any]] = [{**statement, head: missing} if tail else missing]
    value = part[tail or head]
    for other in (None, True, "7", 7, ["7"], [7], {"x": 1}, b"7"):
        if path == "cohort" and other == ["7"]:
            continue
        if isinstance(other, bool) or not isinstance(other, type(value)):
            wrong.append(_with(statement, path, other))
    for each in wrong:
        with pytest.raises(InvalidInput, match="malformed"):
            RoundPlan.from_statement(each)


@pytest.mark.parametrize("name", ["order", "not_trained"])
def test_a_plan_names_the_order_that_its_job_rests_on_and_the_rest_of_its_model_or_none(
    plan: RoundPlan, name: str
) -> None:
    """Without one its statement is what it was before there were any."""
    changes: dict[str, Any] = {name: "6" * 64}
    naming = replace(plan, **changes)
    assert name not in plan.to_statement()
    assert naming.to_statement() == {**plan.to_statement(), name: "6" * 64}
    assert RoundPlan.from_statement(naming.to_statement()) == naming
    for wrong in ("", "6" * 63, "6" * 65, "A" * 64, "6" * 64 + "\n", None, 6, True, ["6" * 64]):
        with pytest.raises(InvalidInput, match="malformed"):
            RoundPlan.from_statement({**plan.to_statement(), name: wrong})


def test_unknown_fields_are_refused(plan: RoundPlan) -> None:
    statement = plan.to_statement()
    for path in ("extra", "local.extra", "noise.extra"):
        with pytest.raises(InvalidInput, match="malformed"):
            RoundPlan.from_statement(_with(statement, path, "x"))


REALS = [path for path in _paths() if path.rpartition(".")[2] in {"sampling_rate", "learning_rate", "max_grad_norm"}]
REALS += ["clipping_norm", "local.noise_multiplier", "local.delta", "noise.noise_multiplier", "noise.delta"]


@pytest.mark.parametrize("path", REALS)
def test_a_number_has_one_spelling_and_is_finite(plan: RoundPlan, path: str) -> None:
    for text in ("", "abc", "1", "1.", " 1.0", "1.0 ", "1_0.0", "0x1", "nan", "inf", "-inf", "1e999", "1e5", "١.٠"):
        with pytest.raises(InvalidInput, match=path.rpartition(".")[2]):
            RoundPlan.from_statement(_with(plan.to_statement(), path, text))


def test_who_contributes_follows_from_the_noise(make_plan: MakePlan, paillier: Scheme) -> None:
    for noise_by, extra in (("both", 1), ("aggregator", 1), ("parties", 0)):
        plan = make_plan(paillier, noise_by=noise_by, parties=4)
        assert plan.aggregator_adds_noise is bool(extra)
        assert 4 + extra == plan.layout["contributions"]
    silent = make_plan(paillier, noise_multiplier=0.0)
    assert not silent.aggregator_adds_noise


# --------------------------------------------------------------------------------------------- roots and openings


@settings(deadline=None, max_examples=40)
@given(names=st.lists(st.text(max_size=5), max_size=5), text=st.text(max_size=5), count=st.integers(0, 2**40))
def test_roots_and_openings_are_read_back(names: list[str], text: str, count: int) -> None:
    root = replace(ROOT, contributor=text, ciphertexts=count)
    assert RootStatement.from_statement(parse_canonical(canonical_bytes(root.to_statement()))) == root
    opening = replace(OPENING, contributors=tuple(names), aggregate_root=text)
    assert OpeningStatement.from_statement(parse_canonical(canonical_bytes(opening.to_statement()))) == opening


@pytest.mark.parametrize("statement", [ROOT, OPENING], ids=["root", "opening"])
def test_a_malformed_root_or_opening_is_refused(statement: RootStatement | OpeningStatement) -> None:
    good = statement.to_statement()
    read = type(statement).from_statement
    needed = good.keys() - {"ledger_head"}  # which no root had before protocol 2.0
    wrong = [{k: v for k, v in good.items() if k != name} for name in needed] + [{**good, "extra": 1}]
    wrong += [{**good, "ledger_head": text} for text in ("x", "A" * 64, "a" * 63, "a" * 65) if "ledger_head" in good]
    for name, value in good.items():
        for other in (None, True, "x", 7, -1, ["x"], [7], {"x": "y"}):
            fits = isinstance(other, type(value)) and not isinstance(other, bool) and other != -1
            if not fits and not (name == "contributors" and other == ["x"]):
                wrong.append({**good, name: other})
    for each in wrong:
        with pytest.raises(InvalidInput, match="malformed"):
            read(each)


def test_a_root_from_before_protocol_2_is_read_and_its_partys_ledger_is_unknown() -> None:
    old = {key: value for key, value in ROOT.to_statement().items() if key != "ledger_head"}
    assert RootStatement.from_statement(old) == replace(ROOT, ledger_head="")


def test_a_digest_is_of_a_statement_and_its_kind() -> None:
    signed = KEY.sign("root", ROOT.to_statement(), signer="a")
    assert signed_digest(signed, "root") == digest({**ROOT.to_statement(), "kind": "root"}, domain="root")
    assert signed_digest(signed, "root") != signed_digest(signed, "list")
    other_signature = replace(signed, signature=bytes(64), signer="b")
    assert signed_digest(other_signature, "root") == signed_digest(signed, "root")


def test_the_aggregate_names_its_plan_and_every_contributor() -> None:
    headers = {
        aggregate_header(plan, names)
        for plan in ("p", "q")
        for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a"), ("a", "aggregator"))
    }
    assert len(headers) == 12
    assert aggregate_header("p", ("a", "b")) == b"sotto/v1/aggregate\np\na,b"


def test_a_proof_is_bound_to_plan_aggregate_and_party() -> None:
    bindings = {share_binding(plan, root, party) for plan in "pq" for root in "rs" for party in "ab"}
    assert len(bindings) == 8
    assert share_binding("p", "r", "a") == b"sotto/v1/shares\np\nr\na"
