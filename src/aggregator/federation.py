"""Who the federation is, seen from the aggregator: its roster, its public key, and the key it signs with.

Two ways to come by them. From a kit (`sotto provision`): the roster is pinned, signed by the operator. Without one (the
classic set-up, custody `aggregator`): the aggregator makes its keys at first start, parties are enrolled as they join,
and the aggregator signs the roster itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config import AggregatorConfig
from ..encryption.dealer import make_key_pair
from ..encryption.keys import PrivateKey
from ..encryption.scheme import Scheme, SystemEntropy
from ..errors import ConfigError, KeyMaterialError, PolicyError
from ..files import is_there, make_private_directory, write_new
from ..protocol.keyring import Keyring
from ..protocol.roster import AGGREGATOR, Member, Roster, load_roster, sign_roster
from ..protocol.signing import Signed, SigningKey
from .disclosed import Disclosed
from .readiness import Readiness

LOG = logging.getLogger("sotto.aggregator")


class Federation:
    """The roster in force and the keys behind it."""

    def __init__(
        self, *, roster: Roster, signed_roster: Signed, keyring: Keyring, signing_key: SigningKey, pinned: bool
    ) -> None:
        self.roster = roster
        self.signed_roster = signed_roster
        self.keyring = keyring
        self.signing_key = signing_key
        self.pinned = pinned
        self._declared: dict[str, dict[str, int]] = {}
        self.readiness = Readiness()
        self.disclosed = Disclosed()

    @property
    def custody(self) -> str:
        """ "threshold" or "aggregator"."""
        return self.roster.custody

    def sign(self, kind: str, statement: dict[str, Any]) -> Signed:
        """The aggregator's signature."""
        return self.signing_key.sign(kind, statement, signer=AGGREGATOR)

    def scheme(self, name: str, *, allow_plaintext: bool) -> Scheme:
        """The scheme of a job; PolicyError for `plaintext` where it is not allowed."""
        if name == "plaintext" and not allow_plaintext:
            raise PolicyError(
                "scheme plaintext encrypts nothing: this aggregator allows it only with "
                "privacy.allow_plaintext_scheme: true"
            )
        return self.keyring.scheme(name)

    def declare(self, name: str, rows: Mapping[str, int]) -> None:
        """What a party says when it joins: by task, a number of rows that its owner makes public. In memory alone: a
        party says it again whenever it comes back."""
        self._declared[name] = dict(rows)

    def declared_rows(self, cohort: Iterable[str], task: str) -> dict[str, int]:
        """Of the parties of a cohort, as far as they have declared any for a task."""
        known = {name: self._declared.get(name, {}).get(task, 0) for name in cohort}
        return {name: rows for name, rows in known.items() if rows}

    def enrol(self, members: Sequence[tuple[str, bytes]], *, created_at: str) -> None:
        """Put everyone who joined into the roster (classic set-up only)."""
        roster = Roster(
            federation=self.roster.federation,
            key_id=self.roster.key_id,
            custody=self.roster.custody,
            threshold=0,
            colluders=self.roster.colluders,
            aggregator_verify_key=self.signing_key.verify_key,
            members=tuple(Member(name, key) for name, key in members),
            created_at=created_at,
        )
        if roster.members != self.roster.members:
            self.roster, self.signed_roster = roster, sign_roster(roster, self.signing_key, signer=AGGREGATOR)


def open_federation(config: AggregatorConfig, *, now: float) -> Federation:
    """The federation of a configuration; makes what the classic set-up makes at first start.

    Raises:
        ConfigError: when roster, keys and configuration contradict each other.
        KeyMaterialError: when a key file is not what it should be.
    """
    keys = config.keys
    private = _load_or_make_private_key(config) if keys.custody == "aggregator" and keys.private_key else None
    if private is not None:
        keyring = Keyring.of_private_key(private)
        _write_public(keys.public_key, keyring)
    else:
        keyring = Keyring.load(keys.public_key, insecure_small=keys.insecure_small_modulus)
    signing_key = SigningKey.load_or_make(keys.signing_key)
    if keys.roster is not None:
        signed, roster = load_roster(keys.roster)
        _check_pinned(config, roster, keyring, signing_key)
        return Federation(roster=roster, signed_roster=signed, keyring=keyring, signing_key=signing_key, pinned=True)
    roster = Roster(
        federation=config.federation,
        key_id=keyring.key_id,
        custody="aggregator",
        threshold=0,
        colluders=config.privacy.colluders,
        aggregator_verify_key=signing_key.verify_key,
        members=(),
        created_at=datetime.fromtimestamp(now, UTC).isoformat(),
    )
    signed = sign_roster(roster, signing_key, signer=AGGREGATOR)
    return Federation(roster=roster, signed_roster=signed, keyring=keyring, signing_key=signing_key, pinned=False)


def _check_pinned(config: AggregatorConfig, roster: Roster, keyring: Keyring, signing_key: SigningKey) -> None:
    problems = []
    if roster.federation != config.federation:
        problems.append(f"federation: {config.federation!r}, but the roster is of {roster.federation!r}")
    if roster.custody != config.keys.custody:
        problems.append(f"keys.custody: {config.keys.custody}, but the roster says {roster.custody}")
    if roster.custody == "threshold" and roster.key_id != keyring.key_id:
        problems.append(f"keys.public_key: has key id {keyring.key_id}, but the roster says {roster.key_id}")
    else:
        try:
            roster.check_deal(keyring.deal_digest)
        except KeyMaterialError as error:
            problems.append(f"keys.public_key: {error.message}")
    if roster.colluders != config.privacy.colluders:
        problems.append(f"privacy.colluders: {config.privacy.colluders}, but the roster stands {roster.colluders}")
    if roster.aggregator_verify_key != signing_key.verify_key:
        problems.append("keys.signing_key: is not the aggregator's key in the roster")
    if len(roster.members) > config.limits.max_parties:
        problems.append(f"limits.max_parties: the roster has {len(roster.members)} parties")
    if problems:
        raise ConfigError("the kit's files contradict each other", problems=tuple(problems))


def _load_or_make_private_key(config: AggregatorConfig) -> PrivateKey:
    keys = config.keys
    path = keys.private_key
    if path is None:  # the caller looked
        raise KeyMaterialError("keys.private_key is not set")
    if is_there(path):
        return PrivateKey.from_json(json.loads(path.read_text()), insecure_small=keys.insecure_small_modulus)
    LOG.info("making a Paillier key pair of %d bits (once)", keys.modulus_bits)
    private = make_key_pair(keys.modulus_bits, entropy=SystemEntropy(), insecure_small=keys.insecure_small_modulus)
    make_private_directory(path.parent)
    write_new(path, json.dumps(private.to_json()).encode(), secret=True)
    return private


def _write_public(path: Path, keyring: Keyring) -> None:
    if not is_there(path):
        make_private_directory(path.parent)
        write_new(path, json.dumps(keyring.to_json(), indent=1).encode() + b"\n", secret=False)
