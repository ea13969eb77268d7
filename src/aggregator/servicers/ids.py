"""Which ids a request may carry: looked at before anything else is done with it, before a database or a log sees one.

One table for all services. A test asks of every text in every request whether it is in here, or why not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from ...errors import InvalidInput
from ...jobs.keeping import CHOICE_PATTERN, CHOICE_WORDS

MOST_ROUNDS: Final = 2**31 - 1
"""What a database's integer holds; a job has at most some thousands."""


def _shaped(pattern: str, rule: str) -> tuple[Callable[[Any], Any], str]:
    return re.compile(pattern).fullmatch, rule


_JOB: Final = _shaped("[A-Za-z0-9_-]{1,64}", "1 to 64 letters, digits, '_' and '-'")
_ANY_JOB: Final = _shaped("[A-Za-z0-9_-]{0,64}", "at most 64 letters, digits, '_' and '-'")
_NAME: Final = _shaped("[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "1 to 63 letters, digits, '.', '_', '-'")
_MAYBE_NAME: Final = _shaped("([A-Za-z0-9][A-Za-z0-9._-]{0,62})?", "at most 63 letters, digits, '.', '_', '-'")
_FILE: Final = _shaped("[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "1 to 100 letters, digits, '.', '_', '-'")
_OPERATION: Final = _shaped("[A-Za-z0-9_/-]{0,80}", "operations/ and a job's id")
_CHOICE: Final = _shaped(CHOICE_PATTERN, CHOICE_WORDS)
_MAYBE_CHOICE: Final = _shaped(f"({CHOICE_PATTERN})?", f"{CHOICE_WORDS}, or nothing")
_WORD: Final = _shaped("[A-Za-z_]{0,32}", "a word of at most 32 letters")
_SUBJECT: Final = _shaped("[A-Za-z0-9_.:@-]{0,160}", "a kind, ':', and a name")
_DIGEST: Final = _shaped("([0-9a-f]{64})?", "64 hex digits, or nothing")
_KEY: Final = _shaped("([0-9a-f]{32})?", "32 hex digits, or nothing")
_VERSION: Final = _shaped("[0-9A-Za-z.+_-]{0,32}", "at most 32 letters, digits, '.', '+', '_', '-'")
_SOFTWARE: Final = _shaped("[ -~]{0,64}", "at most 64 printable ASCII characters")
_REQUEST: Final = (
    lambda text: 1 <= len(text) <= 100 and text.isprintable(),
    "1 to 100 printable characters",
)
_ROUND: Final = (lambda number: 1 <= number <= MOST_ROUNDS, f"1 to {MOST_ROUNDS}")

IDS: Final[dict[str, tuple[Callable[[Any], Any], str]]] = {
    "sotto.v1.RoundName.job_id": _JOB,
    "sotto.v1.RoundName.round": _ROUND,
    "sotto.v1.LedgerHead.digest": _DIGEST,
    "sotto.v1.Signed.signer": _MAYBE_NAME,
    "sotto.v1.JoinRequest.protocol_version": _VERSION,
    "sotto.v1.JoinRequest.software_version": _SOFTWARE,
    "sotto.v1.JoinRequest.key_id": _KEY,
    "sotto.v1.JoinRequest.roster_digest": _DIGEST,
    "sotto.v1.JoinRequest.instance_id": _MAYBE_NAME,
    "sotto.v1.StreamAssignmentsRequest.session_id": _MAYBE_NAME,
    "sotto.v1.UpdateHeader.ledger_head": _DIGEST,
    "sotto.v1.DownloadContributionRequest.contributor": _NAME,
    "sotto.v1.CreateJobRequest.request_id": _REQUEST,
    "sotto.v1.GetJobRequest.job_id": _JOB,
    "sotto.v1.CancelJobRequest.job_id": _JOB,
    "sotto.v1.DeleteJobRequest.job_id": _JOB,
    "sotto.v1.WatchJobRequest.job_id": _JOB,
    "sotto.v1.ListJobEventsRequest.job_id": _JOB,
    "sotto.v1.DownloadArtifactRequest.job_id": _JOB,
    "sotto.v1.DownloadArtifactRequest.file": _FILE,
    "sotto.v1.DownloadArtifactRequest.round": _MAYBE_CHOICE,
    "sotto.v1.GetRoundResultRequest.job_id": _JOB,
    "sotto.v1.GetRoundResultRequest.round": _CHOICE,
    "sotto.v1.GetBudgetRequest.unit": _WORD,
    "sotto.v1.GetBudgetRequest.subject": _SUBJECT,
    "sotto.v1.ListEntriesRequest.unit": _WORD,
    "sotto.v1.ListEntriesRequest.subject": _SUBJECT,
    "sotto.v1.ListEntriesRequest.kind": _WORD,
    "sotto.v1.ListEntriesRequest.job_id": _ANY_JOB,
    "google.longrunning.ListOperationsRequest.name": _OPERATION,
    "google.longrunning.GetOperationRequest.name": _OPERATION,
    "google.longrunning.DeleteOperationRequest.name": _OPERATION,
    "google.longrunning.CancelOperationRequest.name": _OPERATION,
    "google.longrunning.WaitOperationRequest.name": _OPERATION,
}
"""By the field's full name: what is true of an id, and the same in words."""


def check_ids(message: Message) -> None:
    """Raises InvalidInput, which names the field and its rule and quotes nothing, unless all ids have their shape."""
    _check(message, "")


def _check(message: Message, path: str) -> None:
    for field, rule in _fields(message.DESCRIPTOR):
        value = getattr(message, field.name)
        if rule is not None:
            right, words = rule
            if not right(value):
                raise InvalidInput(f"{path}{field.name}: must be {words}", violations={f"{path}{field.name}": words})
        elif field.is_repeated:
            for number, each in enumerate(value):
                _check(each, f"{path}{field.name}[{number}].")
        elif message.HasField(field.name):
            _check(value, f"{path}{field.name}.")


@cache
def _fields(
    descriptor: Descriptor,
) -> tuple[tuple[FieldDescriptor, tuple[Callable[[Any], Any], str] | None], ...]:
    """The fields of a message that are ids, each with its rule, and those that hold messages with ids, without one."""
    return tuple(
        (field, IDS.get(field.full_name))
        for field in descriptor.fields
        if field.full_name in IDS or (field.message_type is not None and _holds_ids(field.message_type))
    )


@cache
def _holds_ids(descriptor: Descriptor) -> bool:
    return descriptor.full_name not in _FREE and bool(_fields(descriptor))


_FREE: Final = frozenset({"google.protobuf.Struct"})
"""Holds itself, and whatever a task takes."""
