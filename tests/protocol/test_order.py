"""A job order is its scientist's: whatever is changed about it, by whomever, it is none."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput, SignatureError
from src.protocol.order import MAX_ORDER_BYTES, ORDER_KIND, Order, open_order, order_time, sign_order
from src.protocol.plan import signed_digest
from src.protocol.roster import Member, Roster, Scientist
from src.protocol.signing import Signed, SigningKey

KEYS = {name: SigningKey.from_bytes(name.encode().ljust(32, b"-")) for name in ("ann", "bob", "a", "z", "aggregator")}
ROSTER = Roster(
    federation="demo",
    key_id="",
    custody="threshold",
    threshold=2,
    colluders=0,
    aggregator_verify_key=KEYS["aggregator"].verify_key,
    members=(Member("a", KEYS["a"].verify_key, 1),),
    created_at="2026-01-01T00:00:00Z",
    scientists=tuple(Scientist(name, KEYS[name].verify_key) for name in ("ann", "bob")),
)
ORDER = Order(
    federation="demo",
    scientist="ann",
    request_id="r-1",
    expires_at="2026-01-31T00:00:00Z",
    job="federated_training",
    spec='{"task":"randhie"}',
    model_sha256="",
    most_rounds=12,
)
SIGNED = sign_order(ORDER, KEYS["ann"])


def signed(by: str = "ann", signer: str = "ann", kind: str = ORDER_KIND, **changes: Any) -> Signed:
    return KEYS[by].sign(kind, {**ORDER.to_statement(), **changes}, signer=signer)


@settings(deadline=None, max_examples=40)
@given(
    spec=st.text(max_size=40),
    request_id=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
    most_rounds=st.integers(0, 2**40),
    expires=st.integers(0, 2**32),
    model=st.sampled_from(["", "ab" * 32]),
    scientist=st.sampled_from(["ann", "bob"]),
)
def test_what_a_scientist_signed_is_what_is_read(
    spec: str, request_id: str, most_rounds: int, expires: int, model: str, scientist: str
) -> None:
    order = replace(
        ORDER,
        scientist=scientist,
        spec=spec,
        request_id=request_id,
        most_rounds=most_rounds,
        expires_at=order_time(expires),
        model_sha256=model,
    )
    by = sign_order(order, KEYS[scientist])
    assert open_order(by, ROSTER) == (order, signed_digest(by, ORDER_KIND))
    assert order.expires == expires


FORGED: list[tuple[str, Signed, type[Exception], str]] = [
    ("by a stranger", signed("z", "z", scientist="z"), SignatureError, "by a stranger: no scientist 'z' in the roster"),
    ("by the aggregator in ann's name", signed("aggregator"), SignatureError, "does not verify"),
    ("by the aggregator", signed("aggregator", "aggregator", scientist="aggregator"), SignatureError, "stranger"),
    ("by a party", signed("a", "a", scientist="a"), SignatureError, "by a stranger"),
    ("by bob in ann's name", signed("bob", "bob"), SignatureError, "bob signed a job order in the name of 'ann'"),
    ("by bob under ann's name", signed("bob", "ann"), SignatureError, "does not verify"),
    ("signed as something else", signed(kind="plan"), SignatureError, "does not verify"),
    ("for another federation", signed(federation="other"), InvalidInput, "for federation 'other', this one is 'demo'"),
    ("of a later version", signed(version=2), InvalidInput, "has version 1, not 2"),
    ("of a version that is true", signed(version=True), InvalidInput, "has version 1"),
    ("without an end", signed(expires_at=""), InvalidInput, "expires_at is not a time"),
    ("until a time that is none", signed(expires_at="2026-02-31T00:00:00Z"), InvalidInput, "expires_at"),
    ("until a time elsewhere", signed(expires_at="2026-01-31T00:00:00+01:00"), InvalidInput, "expires_at"),
    ("until a time in another form", signed(expires_at="2026-1-31T00:00:00Z"), InvalidInput, "expires_at"),
    ("for fewer than no rounds", signed(most_rounds=-1), InvalidInput, "most_rounds"),
    ("for rounds that are a text", signed(most_rounds="12"), InvalidInput, "most_rounds is not of type int"),
    ("for rounds that are true", signed(most_rounds=True), InvalidInput, "most_rounds is not of type int"),
    ("with a specification that is no text", signed(spec={"task": "randhie"}), InvalidInput, "spec is not of type str"),
    ("of a model that is no digest", signed(model_sha256="AB" * 32), InvalidInput, "model_sha256"),
    ("of no request", signed(request_id=""), InvalidInput, "request_id has 1 to 100 characters"),
    ("of a request with a long name", signed(request_id="r" * 101), InvalidInput, "request_id has 1 to 100 characters"),
    ("of a request with a zero byte", signed(request_id="r\0"), InvalidInput, "request_id has 1 to 100 characters"),
    ("with something more", signed(priority="high"), InvalidInput, "malformed"),
    ("that is too long", signed(spec="x" * MAX_ORDER_BYTES), InvalidInput, "at most 262144 bytes"),
]


@pytest.mark.parametrize(("forged", "error", "said"), [row[1:] for row in FORGED], ids=[row[0] for row in FORGED])
def test_what_is_no_scientist_s_order_is_refused(forged: Signed, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        open_order(forged, ROSTER)


@pytest.mark.parametrize("field", [field.name for field in fields(Order)])
def test_an_order_without_one_of_its_fields_is_none(field: str) -> None:
    statement = {name: value for name, value in ORDER.to_statement().items() if name != field}
    with pytest.raises(InvalidInput, match=r"malformed|has version 1"):
        open_order(KEYS["ann"].sign(ORDER_KIND, statement, signer="ann"), ROSTER)


def _with(part: str, data: bytes) -> Signed:
    return replace(SIGNED, statement=data) if part == "statement" else replace(SIGNED, signature=data)


def test_no_bit_of_an_order_can_be_changed() -> None:
    """Of statement and signature."""
    for part in ("statement", "signature"):
        content = getattr(SIGNED, part)
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1
            with pytest.raises(SignatureError):
                open_order(_with(part, bytes(changed)), ROSTER)


def test_an_older_roster_has_nobody_who_could_order() -> None:
    with pytest.raises(SignatureError, match="made before orders were signed"):
        open_order(SIGNED, replace(ROSTER, scientists=()))
