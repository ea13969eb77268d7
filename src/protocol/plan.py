"""The round plan: one statement over all that a round fixes, signed by the aggregator, checked by every party.

Whatever is signed later in the round (roots, list, opening, shares, transcript) names the plan's digest, so that nobody
can be shown another model, another noise or another quorum under the same round.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from ..errors import InvalidInput
from .canonical import real
from .signing import Signed

PLAN_KIND: Final = "plan"
ROOT_KIND: Final = "root"
LIST_KIND: Final = "list"
OPENING_KIND: Final = "opening"
SHARES_KIND: Final = "shares"
TRANSCRIPT_KIND: Final = "transcript"
MANIFEST_KIND: Final = "manifest"

_HEAD: Final = re.compile("[0-9a-f]{64}")
_ANY_DIGEST: Final = "0" * 64

PROTOCOL_VERSION: Final = "3.0"


def signed_digest(signed: Signed, kind: str) -> str:
    """SHA-256 (hex) of a signed statement's bytes under its kind: how later statements refer to it."""
    return hashlib.sha256(f"sotto/v1/{kind}\n".encode() + signed.statement).hexdigest()


Strategy = Literal["fedavg", "fedsgd"]
FEDSGD: Final = "fedsgd"


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """DP-SGD at each party; reals are decimal strings (`canonical.real`).

    Under `fedsgd` a round is one step of it, all parties together: `steps` is 1, `learning_rate` the aggregator's, and
    `noise_multiplier` that of the noise which a row is charged for (`derive.example_event`).
    """

    steps: int
    sampling_rate: str
    learning_rate: str
    max_grad_norm: str
    noise_multiplier: str
    delta: str


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """Party-level noise; variances in squared integer units, as "numerator/denominator".

    Attributes:
        noise_by: both, parties or aggregator.
        noise_multiplier: standard deviation of all planned noise over the sensitivity; a decimal string.
        share_sigma2: of each party's share.
        aggregator_sigma2: of the aggregator's contribution.
        bound: no contribution's noise exceeds it in any coordinate but with probability 2^-64 a job.
        delta: of the party-level guarantee; a decimal string.
    """

    noise_by: str
    noise_multiplier: str
    share_sigma2: str
    aggregator_sigma2: str
    bound: int
    delta: str


@dataclass(frozen=True, slots=True)
class GradientSum:
    """What only a plan of strategy `fedsgd` has.

    Attributes:
        batch_cap: rows whose gradients a slot has room for; a larger batch has its sum shortened, which nobody sees.
        declared_rows: of each party of the cohort, its owner's public number: the divisor's terms.
        trusted_aggregator: the job lets the aggregator alone draw the noise, as a trusted server.
    """

    batch_cap: int
    declared_rows: dict[str, int]
    trusted_aggregator: bool


@dataclass(frozen=True, slots=True)
class NormAdaptation:
    """What only a plan with adaptive clipping has (`privacy.clipping.AdaptiveClipping`); reals are decimal strings.

    Attributes:
        quantile, learning_rate, smallest, largest: how the next round's clipping norm follows from what is opened.
        bit_deviation: standard deviation of all guaranteed noise on the count of bits.
        bit_unit: what one bit is worth in its slot, in integer units.
    """

    quantile: str
    learning_rate: str
    bit_deviation: str
    smallest: str
    largest: str
    bit_unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """All that one round fixes.

    Attributes:
        federation, job_id, round: which round this is; rounds count from 1 and are never tried twice.
        priced_rounds: rounds and spare rounds of the job: the whole plan that budgets are checked against.
        spec_digest: SHA-256 (hex) of the job's specification.
        task, task_options, seed: what is trained; the options are public JSON, as canonical text.
        model_sha256, model_bytes: the global model that the round starts from (safetensors).
        dimension: trainable parameters.
        local: DP-SGD.
        clipping_norm: L2 bound of what a party contributes, a decimal string: of its update, or (fedsgd) of its sum.
        resolution_bits: updates are encoded in multiples of 2^-resolution_bits.
        rounded_bound: L2 bound, in integer units, rounded up: of an encoded update, or (fedsgd) of what one example
            changes in an encoded sum.
        scheme, key_id, layout: how values are packed and protected; the layout as its canonical JSON object.
        noise: party-level noise.
        roster_digest, cohort, quorum, colluders, threshold, custody: who takes part and who may open.
        gradient_sum: of strategy fedsgd; None, and no part of the statement, under fedavg.
        adaptive_clipping: of fedavg with a clipping norm that follows the updates' norms; None, and no part of the
            statement, without.
        not_trained: digest (hex) of what is not trained of the model (`learning.model_file.digest_of`), which everybody
            builds by themselves; empty, and no part of the statement, where there is nothing, or it is not known.
        order: digest (hex) of the order that a scientist signed for the job; empty, and no part of the statement, where
            nobody did.
    """

    federation: str
    job_id: str
    round: int
    priced_rounds: int
    spec_digest: str
    task: str
    task_options: str
    seed: int
    model_sha256: str
    model_bytes: int
    dimension: int
    local: LocalPlan
    clipping_norm: str
    resolution_bits: int
    rounded_bound: int
    scheme: str
    key_id: str
    layout: dict[str, Any]
    noise: NoiseSpec
    roster_digest: str
    cohort: tuple[str, ...]
    quorum: int
    colluders: int
    threshold: int
    custody: str
    gradient_sum: GradientSum | None = None
    adaptive_clipping: NormAdaptation | None = None
    order: str = ""
    not_trained: str = ""

    def to_statement(self) -> dict[str, Any]:
        """Canonical-JSON-able."""
        statement = asdict(self)
        if self.adaptive_clipping is None:  # as plans were before there was any, or a second strategy: digests stay
            del statement["adaptive_clipping"]
        for name in ("order", "not_trained"):
            if not statement[name]:
                del statement[name]
        if self.gradient_sum is None:
            del statement["gradient_sum"]
            return statement
        return {**statement, "strategy": FEDSGD}

    @classmethod
    def from_statement(cls, value: Mapping[str, Any]) -> RoundPlan:
        """Raises InvalidInput when a field is missing, unknown, or of another type."""
        try:
            content = dict(value)
            if not all(_HEAD.fullmatch(content.get(name, _ANY_DIGEST)) for name in ("order", "not_trained")):
                raise ValueError("no digest")
            if {"strategy", "gradient_sum"} & content.keys():  # both, or (fedavg) neither
                if content.pop("strategy") != FEDSGD:
                    raise ValueError("no such strategy")
                content["gradient_sum"] = GradientSum(**content["gradient_sum"])
            if "adaptive_clipping" in content:
                content["adaptive_clipping"] = NormAdaptation(**content["adaptive_clipping"])
            content["local"] = LocalPlan(**content["local"])
            content["noise"] = NoiseSpec(**content["noise"])
            if not isinstance(content["cohort"], list | tuple):
                raise TypeError("a cohort is a list")
            content["cohort"] = tuple(content["cohort"])
            plan = cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput("a round plan is malformed") from error
        _check_types(plan)
        return plan

    @property
    def strategy(self) -> Strategy:
        """How the parties train."""
        return "fedavg" if self.gradient_sum is None else "fedsgd"

    @property
    def bit_unit(self) -> int:
        """What a bit is worth in its slot, in integer units; 0 without adaptive clipping."""
        return self.adaptive_clipping.bit_unit if self.adaptive_clipping else 0

    @property
    def value_count(self) -> int:
        """Values in a contribution: one a parameter and, with adaptive clipping, the bit."""
        return self.dimension + (self.adaptive_clipping is not None)

    @property
    def aggregator_adds_noise(self) -> bool:
        """Whether the aggregator's noise batch is one of the contributions."""
        return self.noise.aggregator_sigma2.partition("/")[0] != "0"


_TYPES: Final[dict[str, type]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "dict[str, Any]": dict,
    "dict[str, int]": dict,
}
_RECORDS: Final = (LocalPlan, NoiseSpec, GradientSum, NormAdaptation)
_REALS: Final = frozenset(
    {
        "sampling_rate",
        "learning_rate",
        "max_grad_norm",
        "noise_multiplier",
        "delta",
        "clipping_norm",
        "quantile",
        "bit_deviation",
        "smallest",
        "largest",
    }
)
"""Strings that are numbers: finite, and in the one form that `canonical.real` writes."""


def _check_types(record: object) -> None:
    for field in fields(record):  # type: ignore[arg-type]  # always a dataclass of this module
        value = getattr(record, field.name)
        wanted = _TYPES.get(str(field.type))
        if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise InvalidInput(f"a round plan is malformed: {field.name} is not of type {field.type}")
        if field.name in _REALS and not _is_real(value):
            raise InvalidInput(f"a round plan is malformed: {field.name} is not a decimal number")
        if isinstance(value, _RECORDS):
            _check_types(value)
    if isinstance(record, RoundPlan) and not all(isinstance(name, str) for name in record.cohort):
        raise InvalidInput("a round plan is malformed: cohort holds something that is not a name")
    if isinstance(record, GradientSum) and not all(
        isinstance(name, str) and type(rows) is int for name, rows in record.declared_rows.items()
    ):
        raise InvalidInput("a round plan is malformed: declared_rows does not give each party a number")


def _is_real(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and real(value) == text


@dataclass(frozen=True, slots=True)
class RootStatement:
    """Commitment to one batch: the statement of kind "root".

    Attributes:
        plan: digest of the round plan.
        contributor: a party's name, or "aggregator" for its noise batch.
        root: Merkle root (hex) over the batch header and every ciphertext.
        ciphertexts: how many.
        body_bytes: length of the ciphertexts back to back.
        proof: that the contributor knows what is inside the ciphertexts (hex; see `knowledge_binding`); empty for a
            scheme without encryption. The signed list brings it to everybody who opens.
        ledger_head: digest (hex) of the last entry of the contributor's own ledger when it signed, with the charge of
            this round in it: so everybody who sees the list can say later that this ledger once had that entry. Empty
            for the aggregator's noise, whose ledger is in the transcript; unknown, and empty, before protocol 2.0.
    """

    plan: str
    contributor: str
    root: str
    ciphertexts: int
    body_bytes: int
    proof: str
    ledger_head: str = ""

    def to_statement(self) -> dict[str, Any]:
        """Canonical-JSON-able."""
        return asdict(self)

    @classmethod
    def from_statement(cls, value: Mapping[str, Any]) -> RootStatement:
        """Raises InvalidInput when malformed."""
        try:
            statement = cls(**value)
        except TypeError as error:
            raise InvalidInput("a root statement is malformed") from error
        texts = (statement.plan, statement.contributor, statement.root, statement.proof, statement.ledger_head)
        counts = (statement.ciphertexts, statement.body_bytes)
        if not all(type(text) is str for text in texts) or not all(type(n) is int and n >= 0 for n in counts):
            raise InvalidInput("a root statement is malformed")
        if statement.ledger_head and not _HEAD.fullmatch(statement.ledger_head):
            raise InvalidInput("a root statement is malformed: ledger_head is no digest")
        return statement


@dataclass(frozen=True, slots=True)
class OpeningStatement:
    """What is to be opened: the statement of kind "opening".

    Attributes:
        plan: digest of the round plan.
        list: digest of the frozen list.
        contributors: who delivered, sorted; the aggregator's noise among them where the plan has it.
        aggregate_root: Merkle root (hex) of the product of their batches.
    """

    plan: str
    list: str
    contributors: tuple[str, ...]
    aggregate_root: str

    def to_statement(self) -> dict[str, Any]:
        """Canonical-JSON-able."""
        return asdict(self)

    @classmethod
    def from_statement(cls, value: Mapping[str, Any]) -> OpeningStatement:
        """Raises InvalidInput when malformed."""
        try:
            statement = cls(**{**value, "contributors": tuple(value["contributors"])})
        except (KeyError, TypeError) as error:
            raise InvalidInput("an opening statement is malformed") from error
        texts = (statement.plan, statement.list, statement.aggregate_root, *statement.contributors)
        if not isinstance(value["contributors"], list | tuple) or not all(type(text) is str for text in texts):
            raise InvalidInput("an opening statement is malformed")
        return statement


def aggregate_header(plan_digest: str, contributors: tuple[str, ...]) -> bytes:
    """The first leaf of the aggregate's Merkle tree: what was multiplied, under which plan."""
    return f"sotto/v1/aggregate\n{plan_digest}\n{','.join(contributors)}".encode()


def knowledge_binding(plan_digest: str, contributor: str) -> bytes:
    """What a proof of knowledge is bound to: job and round (by the plan), and who sends."""
    return f"sotto/v1/knowledge\n{plan_digest}\n{contributor}".encode()


def share_binding(plan_digest: str, aggregate_root: str, party: str) -> bytes:
    """What a proof of correct shares is bound to: job and round (by the plan), the aggregate, and who opens."""
    return f"sotto/v1/shares\n{plan_digest}\n{aggregate_root}\n{party}".encode()
