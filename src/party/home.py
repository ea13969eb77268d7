"""What a party is: its keys, the roster it believes, and what it remembers of the aggregator it met."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from typing import Any, Final

from ..communication.generated import federation_pb2
from ..communication.identity import Identity, certified
from ..communication.messages import signed_from_proto
from ..communication.tls import TlsFiles
from ..config import PartyConfig
from ..encryption.keys import check_kit
from ..encryption.scheme import Scheme
from ..errors import (
    AuthenticationError,
    ConfigError,
    InvalidInput,
    KeyMaterialError,
    PolicyError,
    SottoError,
    VersionError,
)
from ..files import is_there, write_new
from ..protocol.canonical import parse_canonical
from ..protocol.keyring import Keyring, load_share
from ..protocol.plan import PROTOCOL_VERSION, ROOT_KIND, RootStatement
from ..protocol.roster import ROSTER_KIND, Roster, load_roster
from ..protocol.signing import SigningKey, open_signed
from ..storage.heads import Head

LOG = logging.getLogger("sotto.party")

ACQUAINTANCE_FILE: Final = "aggregator.json"


class Home:
    """Keys and roster of one party.

    With a kit, roster and public key are pinned in it. Without one (the classic set-up) the party makes its signing
    key, and believes the first aggregator it meets: that one's key is written down, another one is refused.
    """

    def __init__(self, config: PartyConfig) -> None:
        self.config = config
        self.signing_key = SigningKey.load_or_make(config.keys.signing_key)
        self.pinned = config.keys.roster is not None
        self._roster: Roster | None = None
        self._keyring: Keyring | None = None
        if config.keys.roster is not None:
            _, self._roster = load_roster(config.keys.roster)
            self._check_kit(self._roster)
        else:
            self.check_certificate()

    @property
    def name(self) -> str:
        """This party's name."""
        return self.config.name

    @property
    def roster(self) -> Roster:
        """The roster in force; known at latest after joining."""
        if self._roster is None:
            raise KeyMaterialError("this party has not joined a federation yet")
        return self._roster

    @property
    def keyring(self) -> Keyring:
        """The federation's public key; known at latest after joining."""
        if self._keyring is None:
            raise KeyMaterialError("this party has not joined a federation yet")
        return self._keyring

    def scheme(self, name: str) -> Scheme:
        """A scheme under the federation's key; PolicyError for `plaintext` where it is not allowed."""
        if name == "plaintext" and not self.config.policy.allow_plaintext_scheme:
            raise PolicyError("this party does not send unencrypted updates (policy.allow_plaintext_scheme)")
        return self.keyring.scheme(name)

    @property
    def aggregator_key(self) -> str:
        """Of the aggregator that this party pins, or met before: its verification key, hex; empty before it met any."""
        if self.pinned:
            return self.roster.aggregator_verify_key.hex()
        path = self.config.state_dir / ACQUAINTANCE_FILE
        return str(json.loads(path.read_text())["aggregator_verify_key"]) if path.exists() else ""

    def signed_heads(self, told: Iterable[federation_pb2.LedgerHead]) -> list[Head]:
        """Of the heads of its ledger that a party is told: what its own signed roots say of them."""
        found = []
        for each in told:
            with contextlib.suppress(SottoError):  # what is no root, or not its own, says nothing
                root = open_signed(signed_from_proto(each.root), ROOT_KIND, verify_key=self.signing_key.verify_key)
                digest = RootStatement.from_statement(root).ledger_head
                found.append(Head(digest, each.round.job_id, each.round.round))
        return found

    def fingerprint(self) -> dict[str, str]:
        """What an aggregator has to fit to: what the kit pins, empty where there is none, and the protocol."""
        return {
            "protocol": PROTOCOL_VERSION.partition(".")[0],
            "federation": self.config.federation,
            "custody": self.config.keys.custody,
            "verify_key": self.signing_key.verify_key.hex(),
            **self._pins(),
        }

    def _pins(self) -> dict[str, str]:
        """What the kit pins, which is the same before this party joins and ever after: nothing that it learns. Empty
        where there is no kit, and of the key in custody `aggregator`, whose kits hold none."""
        if not self.pinned:
            return {"key_id": "", "roster_digest": ""}
        return {"key_id": self.roster.key_id, "roster_digest": self.roster.digest}

    def check_files(self) -> None:
        """Look at the kit's files as they are now, as at the start.

        Raises:
            ConfigError: they cannot be used (any more).
        """
        try:
            self.check_certificate()
            if self.config.keys.roster is not None:
                self._check_kit(load_roster(self.config.keys.roster)[1])
        except ConfigError:
            raise
        except (OSError, SottoError, ValueError) as error:
            problem = f"the kit's files cannot be used: {error}"
            raise ConfigError(problem, problems=(problem,)) from error

    def check_certificate(self) -> None:
        """Raises ConfigError when this party's certificate cannot be read, is another's, or does not hold now."""
        problems = self._certificate_problems()
        if problems:
            raise ConfigError(
                "this party's certificate cannot be used: " + "; ".join(problems), problems=tuple(problems)
            )

    def introduction(self) -> federation_pb2.JoinRequest:
        """What the party says of itself when it joins."""
        from .. import __version__

        pins = self._pins()
        return federation_pb2.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            verify_key=self.signing_key.verify_key,
            key_id=pins["key_id"],
            roster_digest=pins["roster_digest"],
            declared_rows={task: dataset.declared_rows for task, dataset in self.config.datasets.items()},
        )

    def accept(self, answer: federation_pb2.JoinResponse) -> None:
        """Check the aggregator's answer against the kit, or against the acquaintance.

        Raises:
            VersionError, KeyMaterialError, PolicyError, SignatureError: it is not whom or what this party expects.
            InvalidInput: it is malformed.
        """
        if answer.protocol_version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
            raise VersionError(
                f"the aggregator speaks protocol {answer.protocol_version}, this party {PROTOCOL_VERSION}"
            )
        if answer.federation != self.config.federation:
            raise KeyMaterialError(
                f"the aggregator runs federation {answer.federation!r}, "
                f"this party belongs to {self.config.federation!r}"
            )
        if answer.custody != self.config.keys.custody:
            raise PolicyError(
                f"the aggregator's custody is {answer.custody}, this party's keys.custody is {self.config.keys.custody}"
            )
        try:
            keyring = Keyring.from_json(
                parse_canonical(answer.public_key), insecure_small=self.config.keys.insecure_small_modulus
            )
        except InvalidInput as error:  # it is nobody's, rather than another's
            raise InvalidInput(f"the aggregator's public key cannot be used: {error.message}") from error
        if self.pinned:
            self._check_pinned(answer, keyring)
            return
        self._acquaint(answer, keyring)
        signed = signed_from_proto(answer.roster)
        statement = open_signed(signed, ROSTER_KIND, verify_key=answer.aggregator_verify_key)
        self._roster, self._keyring = Roster.from_statement(statement), keyring

    def _check_pinned(self, answer: federation_pb2.JoinResponse, keyring: Keyring) -> None:
        roster = self.roster
        if keyring.key_id != roster.key_id and roster.custody == "threshold":
            raise KeyMaterialError(
                f"the aggregator's public key is {keyring.key_id}, this party's kit pins {roster.key_id}"
            )
        if self._keyring is not None and keyring.deal_digest != self._keyring.deal_digest:
            raise KeyMaterialError("the aggregator verifies shares with other values than this party's kit has")
        if answer.aggregator_verify_key != roster.aggregator_verify_key:
            raise KeyMaterialError("the aggregator signs with another key than this party's roster pins")
        if self._keyring is not None and keyring.key_id != self._keyring.key_id:  # its own, which it makes as it likes
            LOG.warning("the aggregator has another public key than before: %s", keyring.key_id)
        self._keyring = keyring

    def _acquaint(self, answer: federation_pb2.JoinResponse, keyring: Keyring) -> None:
        path = self.config.state_dir / ACQUAINTANCE_FILE
        met = {"aggregator_verify_key": answer.aggregator_verify_key.hex(), "key_id": keyring.key_id}
        if not is_there(path):
            write_new(path, json.dumps(met, indent=1).encode() + b"\n", secret=True)
            LOG.warning("no kit: believing the aggregator at %s from now on", self.config.server.address)
            return
        known: dict[str, Any] = json.loads(path.read_text())
        if known != met:
            raise KeyMaterialError(
                f"the aggregator at {self.config.server.address} has other keys than the one met before; if that is "
                f"meant, delete {path}"
            )

    def _check_kit(self, roster: Roster) -> None:
        """A kit is of one piece: roster, keys and share belong together."""
        problems = []
        keys = self.config.keys
        if roster.federation != self.config.federation:
            problems.append(f"federation: {self.config.federation!r}, but the roster is of {roster.federation!r}")
        member = roster.member(self.name)
        if member.verify_key != self.signing_key.verify_key:
            problems.append(f"keys.signing_key: is not {self.name}'s key in the roster")
        if roster.custody != keys.custody:
            problems.append(f"keys.custody: {keys.custody}, but the roster says {roster.custody}")
        if roster.custody == "threshold":
            self._keyring = Keyring.load(keys.public_key, insecure_small=keys.insecure_small_modulus)
            if self._keyring.key_id != roster.key_id:
                problems.append(f"keys.public_key: has key id {self._keyring.key_id}, the roster says {roster.key_id}")
            else:
                problems += self._deal_problems(roster, self._keyring)
            problems += self._share_problems(member.share_index)
        problems += self._certificate_problems()
        if problems:
            raise ConfigError("the kit's files contradict each other", problems=tuple(problems))

    def _deal_problems(self, roster: Roster, keyring: Keyring) -> list[str]:
        try:
            roster.check_deal(keyring.deal_digest)
        except KeyMaterialError as error:
            return [f"keys.public_key: {error.message}"]
        return []

    def _certificate_problems(self) -> list[str]:
        """The aggregator believes the certificate, whoever brings it: with another's this party would be taken for it,
        and sign with a key that is not that one's."""
        tls = self.config.server.tls
        if tls is None:
            return []
        pem = TlsFiles(tls.certificate, tls.key, tls.ca).read()[0]
        if not self.pinned:
            return []
        try:
            federation, identity = certified(pem)
        except AuthenticationError as error:
            return [f"server.tls.certificate: {error.message}"]
        if (federation, identity) == (self.config.federation, Identity("party", self.name)):
            return []
        return [f"server.tls.certificate: is {identity}'s of {federation}, not party/{self.name}'s of this federation"]

    def _share_problems(self, index: int) -> list[str]:
        path, key = self.config.keys.share, self.keyring.threshold_key
        if not index:
            return []
        if path is None or key is None:
            return ["keys.share: the roster says that this party holds a key share"]
        share = load_share(path)
        if share.index != index:
            return [f"keys.share: is share {share.index}, the roster gives this party share {index}"]
        try:
            check_kit(key, share)
        except KeyMaterialError as error:
            return [f"keys.share: {error.message}"]
        return []
