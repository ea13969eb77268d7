"""The roster: what it says is what was signed, and a changed kit does not load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import InvalidInput, KeyMaterialError, NotFoundError, SignatureError
from src.protocol.canonical import canonical_bytes, parse_canonical
from src.protocol.roster import Member, Roster, Scientist, load_roster, save_roster, sign_roster
from src.protocol.signing import SigningKey

OPERATOR = SigningKey.from_bytes(bytes(range(32)))
MEMBERS = (Member("a", b"\1" * 32, 1), Member("b", b"\2" * 32, 2), Member("c", b"\3" * 32))
ROSTER = Roster(
    federation="demo",
    key_id="k" * 16,
    custody="threshold",
    threshold=2,
    colluders=0,
    aggregator_verify_key=b"\7" * 32,
    members=MEMBERS,
    created_at="2026-01-01T00:00:00+00:00",
)
SCIENTISTS = (Scientist("ann", b"\4" * 32), Scientist("a", b"\5" * 32))


@settings(deadline=None, max_examples=40)
@given(
    names=st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6),
    threshold=st.integers(0, 6),
    keys=st.binary(min_size=32, max_size=32),
)
def test_a_roster_is_read_back_from_its_statement(names: list[str], threshold: int, keys: bytes) -> None:
    members = tuple(Member(name, keys, index) for index, name in enumerate(names))
    roster = replace(ROSTER, members=members, threshold=threshold)
    assert Roster.from_statement(parse_canonical(canonical_bytes(roster.to_statement()))) == roster
    assert roster.names == tuple(names)
    assert [member.share_index for member in roster.holders] == [index for index in range(len(names)) if index]


OTHERS: dict[str, Any] = {
    "federation": "other",
    "key_id": "other",
    "custody": "aggregator",
    "threshold": 3,
    "colluders": 1,
    "aggregator_verify_key": b"\6" * 32,
    "members": MEMBERS[:2],
    "created_at": "2026-01-02T00:00:00+00:00",
    "scientists": SCIENTISTS,
    "deal_digest": "d" * 64,
}


@pytest.mark.parametrize("field", OTHERS)
def test_the_digest_covers_every_field(field: str) -> None:
    assert set(OTHERS) == set(Roster.__slots__)
    assert replace(ROSTER, **{field: OTHERS[field]}).digest != ROSTER.digest


def test_a_roster_without_a_deal_s_digest_is_that_of_before_there_was_one() -> None:
    assert ROSTER.digest == "9848cd394de88d5524b3198d10db04f9ad02a1e2b698fdcdac9a770f2040626e"
    assert "deal_digest" not in ROSTER.to_statement()
    with pytest.raises(InvalidInput):  # said to be empty it would be another statement for the same roster
        Roster.from_statement({**ROSTER.to_statement(), "deal_digest": ""})
    dealt = replace(ROSTER, deal_digest="d" * 64)
    assert Roster.from_statement(parse_canonical(canonical_bytes(dealt.to_statement()))) == dealt


def test_the_public_values_of_a_deal_are_those_that_were_signed_for() -> None:
    dealt = replace(ROSTER, deal_digest="d" * 64)
    dealt.check_deal("d" * 64)
    for other in ("e" * 64, ""):
        with pytest.raises(KeyMaterialError, match="verification values"):
            dealt.check_deal(other)
    ROSTER.check_deal("e" * 64)  # made before rosters had it: nothing binds them


def test_the_digest_covers_every_member_and_their_order() -> None:
    changed = [
        (replace(MEMBERS[0], name="z"), *MEMBERS[1:]),
        (replace(MEMBERS[0], verify_key=b"\x09" * 32), *MEMBERS[1:]),
        (replace(MEMBERS[0], share_index=3), *MEMBERS[1:]),
        (MEMBERS[1], MEMBERS[0], MEMBERS[2]),
    ]
    digests = {replace(ROSTER, members=members).digest for members in changed}
    assert len(digests | {ROSTER.digest}) == 5


def test_the_digest_covers_every_scientist_and_one_without_any_is_that_of_before_there_were_any() -> None:
    changed = [(), SCIENTISTS, SCIENTISTS[::-1], SCIENTISTS[:1], (replace(SCIENTISTS[0], verify_key=b"\6" * 32),)]
    assert len({replace(ROSTER, scientists=scientists).digest for scientists in changed}) == len(changed)
    assert ROSTER.digest == "9848cd394de88d5524b3198d10db04f9ad02a1e2b698fdcdac9a770f2040626e"
    assert "scientists" not in ROSTER.to_statement()


def test_a_roster_with_scientists_is_read_back_from_its_statement() -> None:
    roster = replace(ROSTER, scientists=SCIENTISTS)
    assert Roster.from_statement(parse_canonical(canonical_bytes(roster.to_statement()))) == roster
    assert roster.scientist("a") == SCIENTISTS[1]
    with pytest.raises(NotFoundError, match=r"no scientist 'b' in the roster .*\(in it: ann, a\)"):
        roster.scientist("b")
    with pytest.raises(NotFoundError, match="nobody: it was made before orders were signed"):
        ROSTER.scientist("ann")


def test_whose_key_is_whose() -> None:
    assert ROSTER.verify_key("b") == b"\2" * 32
    assert ROSTER.verify_key("aggregator") == b"\7" * 32
    assert ROSTER.holders == MEMBERS[:2]
    for stranger in ("d", "", "operator"):
        with pytest.raises(NotFoundError):
            ROSTER.verify_key(stranger)


@pytest.mark.parametrize(
    "members",
    [(MEMBERS[0], replace(MEMBERS[1], name="a")), (MEMBERS[0], replace(MEMBERS[1], share_index=1))],
    ids=["a name", "a share index"],
)
def test_nothing_is_named_twice(members: tuple[Member, ...]) -> None:
    with pytest.raises(InvalidInput, match="twice"):
        replace(ROSTER, members=members)
    with pytest.raises(InvalidInput, match="scientist twice"):
        replace(ROSTER, scientists=(*SCIENTISTS, replace(SCIENTISTS[0], verify_key=b"\6" * 32)))


def _changed(**changes: Any) -> dict[str, Any]:
    return {**ROSTER.to_statement(), **changes}


MALFORMED: dict[str, dict[str, Any]] = {
    **{f"no {field}": {k: v for k, v in _changed().items() if k != field} for field in ROSTER.to_statement()},
    "an unknown field": _changed(extra=1),
    "a key that is no hex": _changed(aggregator_verify_key="zz"),
    "a key that is no text": _changed(aggregator_verify_key=7),
    "a threshold that is a text": _changed(threshold="2"),
    "a threshold that is true": _changed(threshold=True),
    "a negative threshold": _changed(threshold=-1),
    "a federation that is a number": _changed(federation=7),
    "members that are no list": _changed(members=7),
    "a member that is a text": _changed(members=["a"]),
    "a member without a key": _changed(members=[{"name": "a", "share_index": 1}]),
    "a member with more": _changed(members=[{"name": "a", "verify_key": "00", "share_index": 1, "x": 1}]),
    "a member whose name is a number": _changed(members=[{"name": 1, "verify_key": "00", "share_index": 1}]),
    "no scientists, said": _changed(scientists=[]),
    "scientists that are a number": _changed(scientists=7),
    "a scientist that is a text": _changed(scientists=["ann"]),
    "a scientist without a key": _changed(scientists=[{"name": "ann"}]),
    "a scientist with more": _changed(scientists=[{"name": "ann", "verify_key": "00", "share_index": 1}]),
    "a scientist whose name is a number": _changed(scientists=[{"name": 1, "verify_key": "00"}]),
    "a deal's digest that is a number": _changed(deal_digest=7),
    "a share index that is a text": _changed(members=[{"name": "a", "verify_key": "00", "share_index": "1"}]),
}


@pytest.mark.parametrize("statement", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_roster_is_refused(statement: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Roster.from_statement(statement)


def _pin(path: Path) -> Path:
    save_roster(path, sign_roster(ROSTER, OPERATOR), operator_verify_key=OPERATOR.verify_key)
    return path


def test_a_pinned_roster_loads_as_it_was_signed(tmp_path: Path) -> None:
    signed, roster = load_roster(_pin(tmp_path / "roster.json"))
    assert roster == ROSTER
    assert signed == sign_roster(ROSTER, OPERATOR)
    assert signed.signer == "operator"


def test_no_changed_byte_of_a_pinned_roster_changes_who_is_in(tmp_path: Path) -> None:
    """Every byte, changed by one bit: the file does not load, or says the same (white space, the signer's label)."""
    path = _pin(tmp_path / "roster.json")
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            roster = load_roster(path)[1]
        except (KeyMaterialError, SignatureError):
            continue
        assert roster == ROSTER, position


def test_a_roster_signed_by_another_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    stranger = SigningKey.from_bytes(bytes(32))
    save_roster(path, sign_roster(ROSTER, stranger), operator_verify_key=OPERATOR.verify_key)
    with pytest.raises(SignatureError):
        load_roster(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", json.dumps({"roster": {}, "operator_verify_key": "zz"})])
def test_a_file_that_is_no_roster_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "roster.json"
    path.write_text(content)
    with pytest.raises(KeyMaterialError, match="not a pinned roster"):
        load_roster(path)
