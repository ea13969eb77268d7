"""The roster: who is in the federation, with which keys, signed at provisioning and pinned in every kit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import InvalidInput, KeyMaterialError, NotFoundError
from ..files import write_new
from .canonical import digest
from .signing import Signed, SigningKey, open_signed

AGGREGATOR: Final = "aggregator"
OPERATOR: Final = "operator"
ROSTER_KIND: Final = "roster"


@dataclass(frozen=True, slots=True)
class Member:
    """An enrolled party.

    Attributes:
        name: unique in the federation.
        verify_key: Ed25519, 32 bytes.
        share_index: which key share it holds, from 1; 0 for none.
    """

    name: str
    verify_key: bytes
    share_index: int = 0


@dataclass(frozen=True, slots=True)
class Scientist:
    """Who may order jobs.

    Attributes:
        name: unique among those who may; "operator" is the operator.
        verify_key: Ed25519, 32 bytes: what they sign their orders with.
    """

    name: str
    verify_key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who is in, and under which rules a sum may be opened.

    Attributes:
        federation: its name.
        key_id: of the Paillier public key.
        custody: "threshold" or "aggregator".
        threshold: shares an opening needs; 0 with custody aggregator.
        colluders: corrupt share holders that the threshold rule was checked for.
        aggregator_verify_key: Ed25519, 32 bytes.
        members: the parties, by name.
        created_at: UTC, ISO 8601.
        scientists: who may order jobs; none, and no part of the statement, in rosters from before orders were signed.
        deal_digest: SHA-256 (hex) over all public values of the deal, those included that shares are verified with
            (`ThresholdKey.digest`); empty, and no part of the statement, where nothing was dealt and in older rosters.
    """

    federation: str
    key_id: str
    custody: str
    threshold: int
    colluders: int
    aggregator_verify_key: bytes
    members: tuple[Member, ...]
    created_at: str
    scientists: tuple[Scientist, ...] = ()
    deal_digest: str = ""

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        indices = [member.share_index for member in self.members if member.share_index]
        if len(set(names)) != len(names) or len(set(indices)) != len(indices):
            raise InvalidInput("a roster names a party or a share index twice")
        if len({scientist.name for scientist in self.scientists}) != len(self.scientists):
            raise InvalidInput("a roster names a scientist twice")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parties, in the roster's order."""
        return tuple(member.name for member in self.members)

    @property
    def holders(self) -> tuple[Member, ...]:
        """The parties that hold a key share."""
        return tuple(member for member in self.members if member.share_index)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical statement."""
        return digest(self.to_statement(), domain=ROSTER_KIND)

    def member(self, name: str) -> Member:
        """The party of that name; NotFoundError when it is not enrolled."""
        for member in self.members:
            if member.name == name:
                return member
        raise NotFoundError(f"no party {name!r} in federation {self.federation!r}", party=name)

    def check_deal(self, digest: str) -> None:
        """Whether public values of a deal (`Keyring.deal_digest`) are those that the operator signed for. The key id
        names n and h alone: with other verification values a right share would seem wrong, or a wrong one right.

        Raises:
            KeyMaterialError: they are others.
        """
        if self.deal_digest and digest != self.deal_digest:
            raise KeyMaterialError("the verification values of its key are not those that the roster was signed for")

    def verify_key(self, signer: str) -> bytes:
        """Of a party, or of the aggregator by its name."""
        return self.aggregator_verify_key if signer == AGGREGATOR else self.member(signer).verify_key

    def scientist(self, name: str) -> Scientist:
        """Who orders jobs under that name; NotFoundError when nobody does."""
        for scientist in self.scientists:
            if scientist.name == name:
                return scientist
        known = ", ".join(each.name for each in self.scientists) or "nobody: it was made before orders were signed"
        raise NotFoundError(
            f"no scientist {name[:64]!r} in the roster of federation {self.federation!r} (in it: {known})"
        )

    def to_statement(self) -> dict[str, Any]:
        """Canonical-JSON-able; keys as hex."""
        value = asdict(self)
        value["aggregator_verify_key"] = self.aggregator_verify_key.hex()
        value["members"] = [{**asdict(m), "verify_key": m.verify_key.hex()} for m in self.members]
        value["scientists"] = [{"name": s.name, "verify_key": s.verify_key.hex()} for s in self.scientists]
        if not self.scientists:  # as rosters were before there were any: digests stay
            del value["scientists"]
        if not self.deal_digest:  # as rosters were before they had one: digests stay
            del value["deal_digest"]
        return value

    @classmethod
    def from_statement(cls, value: Mapping[str, Any]) -> Roster:
        """Raises InvalidInput when a field is missing, unknown or of another type."""
        try:
            fields = dict(value)
            fields["aggregator_verify_key"] = bytes.fromhex(fields["aggregator_verify_key"])
            fields["members"] = tuple(
                Member(**{**member, "verify_key": bytes.fromhex(member["verify_key"])}) for member in fields["members"]
            )
            if "scientists" in fields:
                fields["scientists"] = _scientists(fields["scientists"])
            roster = cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInput("a roster is malformed") from error
        if value.get("deal_digest", "none") == "":  # it is left out where it is empty: one roster, one digest
            raise InvalidInput("a roster is malformed")
        texts = (roster.federation, roster.key_id, roster.custody, roster.created_at, roster.deal_digest, *roster.names)
        texts += tuple(scientist.name for scientist in roster.scientists)
        counts = (roster.threshold, roster.colluders, *(member.share_index for member in roster.members))
        if not all(type(text) is str for text in texts) or not all(type(n) is int and n >= 0 for n in counts):
            raise InvalidInput("a roster is malformed")
        return roster


def _scientists(values: list[dict[str, Any]]) -> tuple[Scientist, ...]:
    if not values:  # a list that is left out where it is empty: one statement, one digest
        raise ValueError("an empty list of scientists")
    return tuple(Scientist(**{**each, "verify_key": bytes.fromhex(each["verify_key"])}) for each in values)


def sign_roster(roster: Roster, key: SigningKey, *, signer: str = OPERATOR) -> Signed:
    """The roster as a signed statement."""
    return key.sign(ROSTER_KIND, roster.to_statement(), signer=signer)


def save_roster(path: Path, signed: Signed, *, operator_verify_key: bytes) -> None:
    """Write what a kit pins: the signed roster and the key that it verifies under."""
    content = {"roster": signed.to_json(), "operator_verify_key": operator_verify_key.hex()}
    write_new(path, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n", secret=False)


def load_roster(path: Path) -> tuple[Signed, Roster]:
    """The roster a kit pins, its signature verified.

    Raises:
        KeyMaterialError: when the file is not a pinned roster; SignatureError when its signature does not verify.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        signed = Signed.from_json(content["roster"])
        key = bytes.fromhex(content["operator_verify_key"])
    except (ValueError, KeyError, TypeError, InvalidInput) as error:
        raise KeyMaterialError(f"{path} is not a pinned roster") from error
    return signed, Roster.from_statement(open_signed(signed, ROSTER_KIND, verify_key=key))
