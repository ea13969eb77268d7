"""Every error that Sotto raises on purpose, and what each means to a caller.

An exception carries a public message (safe to show to anyone who may call), metadata (short public strings), and
optionally a private text that goes to the log and nowhere else. One table, `CATALOGUE`, maps its class to the gRPC
status, the `google.rpc.ErrorInfo.reason` and the exit code of the command line; a test asserts that every class has a
row.

    SottoError
    ├── ConfigError                 a configuration that cannot be used; carries every problem with its path
    ├── InvalidInput                the caller sent something malformed
    │   ├── BatchError              a batch cut short, too long, of another version, layout or key
    │   ├── CiphertextError         a ciphertext outside Z*_{n^2}; carries its index
    │   ├── KnowledgeError          a batch whose sender has not proven to know what is inside
    │   ├── SlotOverflowError       a value that its slot cannot hold; carries its index
    │   ├── KeyMaterialError        a key, share or modulus that is not what it claims to be
    │   ├── DigestError             bytes that do not have the digest they were announced with
    │   └── SignatureError          a signature that does not verify, or of a signer who is not in the roster
    ├── Refused                     well-formed, and against a rule
    │   ├── BudgetError             the privacy or round budget does not allow it
    │   ├── PolicyError             this party's or aggregator's own policy does not allow it
    │   ├── PlanError               a round plan that contradicts what was pinned or seen before
    │   ├── OpeningError            an aggregate that an honest party does not open
    │   ├── VersionError            the peer speaks another protocol version
    │   └── TaskError               a task that cannot be trained at a party; says one of a closed list of reasons
    ├── ShareError                  a key share's partial decryption that is wrong; carries the party
    │   └── TooFewSharesError       fewer correct shares than the threshold
    ├── NotFoundError               no such job, round, artifact, blob
    ├── ConflictError               it exists already, with another content
    │   └── TwinError               another process of the same party is at work
    ├── StateError                  not possible in the state it is in
    ├── LeaseError                  a job that another process holds by now
    ├── AuthenticationError         who is calling is not known
    ├── AccessError                 the caller's role may not do this
    ├── LimitError                  larger or more than a configured limit
    │   └── BusyError               more calls at a time than one caller may have
    ├── UnavailableError            a peer or service cannot be reached now
    ├── DeadlineError               it did not end in time
    ├── AbandonedError              it was cancelled
    ├── EvaluationError             a model that cannot be measured: public rows, model or metrics are at fault
    ├── RoundFailed, JobFailed      a round or job ended without a result; says who and why
    ├── LedgerError                 a ledger whose chain is broken, or that cannot be written
    ├── StorageError                a database or blob that is damaged or of another version
    │   └── StorageFullError        it cannot be written now
    └── WorkerError                 a unit of CPU work died or failed for a reason of its own
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .text import brief, printable

MAX_TEXT_CHARACTERS: Final = 8000
"""Of a message, a private text, a problem, a violation, a value of metadata: what was wrong with a whole configuration
fits, and a text of somebody else's does not pass through a process as long as they like."""
MAX_DETAILS: Final = 100
"""Values of metadata, and violations."""
_MAX_KEY_CHARACTERS: Final = 500


class SottoError(Exception):
    """Base of all errors raised on purpose. Its texts often quote somebody else's: each becomes one line of printable
    characters of at most `MAX_TEXT_CHARACTERS` here, so that no log, terminal or peer is shown anything else.

    Args:
        message: public text: one sentence that says what is wrong and where; no private data.
        private: text for the log of the process that raised it.
        metadata: short public strings (index, party, limit, …) that become `ErrorInfo.metadata`.
    """

    def __init__(self, message: str, *, private: str = "", **metadata: object) -> None:
        self.message = printable(message, MAX_TEXT_CHARACTERS)
        super().__init__(self.message)
        self.private = printable(private, MAX_TEXT_CHARACTERS)
        self.metadata: dict[str, str] = public_texts(metadata)
        self.remote = False
        """Whether another process raised it. Then it is that one's word, and nothing that was found out here."""


class ConfigError(SottoError):
    """A configuration that cannot be used. `problems` lists each one as "path: what is wrong and what is allowed"."""

    def __init__(self, message: str, *, problems: tuple[str, ...] = (), private: str = "", **metadata: object) -> None:
        super().__init__(message, private=private, **metadata)
        self.problems = tuple(printable(each, MAX_TEXT_CHARACTERS) for each in problems)


class InvalidInput(SottoError):
    """The caller sent something malformed. `violations` maps a field's path to what is wrong with it."""

    def __init__(
        self, message: str, *, violations: dict[str, str] | None = None, private: str = "", **metadata: object
    ) -> None:
        super().__init__(message, private=private, **metadata)
        self.violations = public_texts(violations or {})


class BatchError(InvalidInput):
    """A batch that is cut short, too long, of another version, slot width, count, round, job or key."""


class CiphertextError(InvalidInput):
    """A ciphertext outside Z*_{n^2}; `metadata["index"]` says which."""


class KnowledgeError(InvalidInput):
    """A batch whose sender has not proven to know what is inside its ciphertexts."""


class SlotOverflowError(InvalidInput):
    """A value that its slot cannot hold; `metadata["index"]` says which."""


class KeyMaterialError(InvalidInput):
    """A key, share or modulus that is not what it claims to be."""


class DigestError(InvalidInput):
    """Bytes that do not have the digest they were announced with."""


class SignatureError(InvalidInput):
    """A signature that does not verify, or whose signer is not in the roster."""


class Refused(SottoError):
    """Well-formed, and against a rule."""


class BudgetError(Refused):
    """The privacy or round budget does not allow it."""


class PolicyError(Refused):
    """The own policy of this party or aggregator does not allow it."""


class PlanError(Refused):
    """A round plan that contradicts what is pinned in the kit or what was seen before."""


class OpeningError(Refused):
    """An aggregate that an honest party does not open."""


class VersionError(Refused):
    """The peer speaks another version of the protocol."""


class TaskError(Refused):
    """A task cannot be trained at a party, for a reason of `protocol.faults`: `metadata["problem"]`, and a place in
    the task's file in `metadata["place"]` where there is one. Found before anything is charged."""


class ShareError(SottoError):
    """A partial decryption that is wrong; `metadata["index"]` or `metadata["party"]` says whose."""


class TooFewSharesError(ShareError):
    """Fewer correct shares than the threshold."""


class NotFoundError(SottoError):
    """No such job, round, artifact or blob."""


class ConflictError(SottoError):
    """It exists already, with another content."""


class TwinError(ConflictError):
    """Another process of the same party is at work: its kit is in use twice."""


class StateError(SottoError):
    """Not possible in the state it is in."""


class LeaseError(SottoError):
    """Another process holds the job by now: this one may not write about it any more."""


class AuthenticationError(SottoError):
    """Who is calling is not known."""


class AccessError(SottoError):
    """The caller's role may not do this."""


class LimitError(SottoError):
    """Larger, longer or more than a configured limit."""


class BusyError(LimitError):
    """More calls at a time than one caller may have; it goes when one of them has ended."""


class UnavailableError(SottoError):
    """A peer or service cannot be reached now; trying again later may help."""


class DeadlineError(SottoError):
    """It did not end in time."""


class AbandonedError(SottoError):
    """It was cancelled."""


class EvaluationError(SottoError):
    """A model cannot be measured, whatever its parameters are: the public rows, the task's model or its metrics are at
    fault. It costs no more than that it is not known how good a model is."""


class RoundFailed(SottoError):
    """A round ended without a result; the message names who and why."""


class JobFailed(SottoError):
    """A job ended without a result; the message names stage, party and cause."""


class LedgerError(SottoError):
    """A ledger whose chain is broken or that cannot be written. Nothing is released on top of it."""


class StorageError(SottoError):
    """A database or blob that is damaged, or was written by another version."""


class StorageFullError(StorageError):
    """Nothing can be written now: a full disk, a used-up quota, no file left, a file system that is read-only or fails;
    the message names it. It passes when somebody makes room or mends that, and says nothing of what is stored."""


class WorkerError(SottoError):
    """A unit of CPU work died, or failed for a reason of its own."""


def public_texts(values: Mapping[str, object]) -> dict[str, str]:
    """Details as an error carries them, whoever named them: at most `MAX_DETAILS`, each printable and not too long."""
    kept = list(values.items())[:MAX_DETAILS]
    return {printable(key, _MAX_KEY_CHARACTERS): brief(value, MAX_TEXT_CHARACTERS) for key, value in kept}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a class of error means outside the process.

    Attributes:
        status: the name of the gRPC status code.
        reason: `google.rpc.ErrorInfo.reason`, UPPER_SNAKE_CASE.
        exit_code: of the command line; 0 is success, 1 an unexpected error, 2 wrong usage.
    """

    status: str
    reason: str
    exit_code: int


DOMAIN: Final = "sotto.v1"
"""`google.rpc.ErrorInfo.domain` of everything in `CATALOGUE`."""

UNEXPECTED: Final = Meaning("INTERNAL", "INTERNAL", 1)
"""An error nobody raised on purpose: the caller learns that it happened, the log learns the rest."""

CATALOGUE: Final[dict[type[SottoError], Meaning]] = {
    SottoError: UNEXPECTED,
    ConfigError: Meaning("INVALID_ARGUMENT", "CONFIG_INVALID", 3),
    InvalidInput: Meaning("INVALID_ARGUMENT", "INVALID_INPUT", 4),
    BatchError: Meaning("INVALID_ARGUMENT", "BATCH_INVALID", 4),
    CiphertextError: Meaning("INVALID_ARGUMENT", "CIPHERTEXT_INVALID", 4),
    KnowledgeError: Meaning("INVALID_ARGUMENT", "KNOWLEDGE_UNPROVEN", 4),
    SlotOverflowError: Meaning("INVALID_ARGUMENT", "SLOT_OVERFLOW", 4),
    KeyMaterialError: Meaning("INVALID_ARGUMENT", "KEY_MATERIAL_INVALID", 4),
    DigestError: Meaning("DATA_LOSS", "DIGEST_MISMATCH", 4),
    SignatureError: Meaning("INVALID_ARGUMENT", "SIGNATURE_INVALID", 4),
    Refused: Meaning("FAILED_PRECONDITION", "REFUSED", 5),
    BudgetError: Meaning("FAILED_PRECONDITION", "BUDGET_EXCEEDED", 6),
    PolicyError: Meaning("FAILED_PRECONDITION", "POLICY_REFUSED", 5),
    PlanError: Meaning("FAILED_PRECONDITION", "PLAN_REFUSED", 5),
    OpeningError: Meaning("FAILED_PRECONDITION", "OPENING_REFUSED", 5),
    VersionError: Meaning("FAILED_PRECONDITION", "VERSION_MISMATCH", 5),
    TaskError: Meaning("FAILED_PRECONDITION", "TASK_NOT_READY", 5),
    ShareError: Meaning("INVALID_ARGUMENT", "SHARE_INVALID", 4),
    TooFewSharesError: Meaning("FAILED_PRECONDITION", "TOO_FEW_SHARES", 5),
    NotFoundError: Meaning("NOT_FOUND", "NOT_FOUND", 7),
    ConflictError: Meaning("ALREADY_EXISTS", "ALREADY_EXISTS", 8),
    TwinError: Meaning("ALREADY_EXISTS", "KIT_IN_USE", 8),
    StateError: Meaning("FAILED_PRECONDITION", "WRONG_STATE", 8),
    LeaseError: Meaning("ABORTED", "LEASE_LOST", 8),
    AuthenticationError: Meaning("UNAUTHENTICATED", "UNAUTHENTICATED", 9),
    AccessError: Meaning("PERMISSION_DENIED", "PERMISSION_DENIED", 9),
    LimitError: Meaning("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED", 4),
    BusyError: Meaning("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS", 10),
    UnavailableError: Meaning("UNAVAILABLE", "UNAVAILABLE", 10),
    DeadlineError: Meaning("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 11),
    AbandonedError: Meaning("CANCELLED", "CANCELLED", 12),
    EvaluationError: Meaning("FAILED_PRECONDITION", "EVALUATION_FAILED", 13),
    RoundFailed: Meaning("ABORTED", "ROUND_FAILED", 13),
    JobFailed: Meaning("ABORTED", "JOB_FAILED", 13),
    LedgerError: Meaning("DATA_LOSS", "LEDGER_DAMAGED", 14),
    StorageError: Meaning("DATA_LOSS", "STORAGE_DAMAGED", 14),
    StorageFullError: Meaning("RESOURCE_EXHAUSTED", "STORAGE_FULL", 14),
    WorkerError: Meaning("INTERNAL", "WORKER_FAILED", 15),
}


def meaning(error: BaseException) -> Meaning:
    """What `error` means to a caller; anything that is not a `SottoError` is `UNEXPECTED`."""
    for cls in type(error).__mro__:
        if cls in CATALOGUE:
            return CATALOGUE[cls]
    return UNEXPECTED


PASSING: Final = (UnavailableError, AbandonedError, BusyError, StorageFullError, LeaseError)
"""What may be gone when the same call is made again a little later, with nothing changed by its caller: a service that
is away or stopping, too many calls at a time, a full disk, a job that is about to be somebody else's. All others come
again: what was asked is wrong or refused, or something is broken that only people mend."""

BY_REASON: Final[dict[str, type[SottoError]]] = {
    row.reason: cls for cls, row in CATALOGUE.items() if cls is not SottoError
}
"""The class for an `ErrorInfo.reason`: how a client turns a status back into the error that was raised."""
