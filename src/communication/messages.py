"""Between wire messages and the values the rest of the house works with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from ..errors import InvalidInput
from ..protocol.faults import PLACE, TaskStanding
from ..protocol.signing import Signed
from ..storage.heads import HEADS_KEPT, Head
from .generated import common_pb2, federation_pb2

MAX_TASKS: Final = 1000
"""Of which a party says how it stands with them."""
_TASK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}|")
_PROBLEM: Final = re.compile(r"[A-Z][A-Z_]{0,39}|")


def signed_to_proto(signed: Signed) -> common_pb2.Signed:
    """The message for a signed statement."""
    return common_pb2.Signed(statement=signed.statement, signer=signed.signer, signature=signed.signature)


def signed_from_proto(message: common_pb2.Signed) -> Signed:
    """The signed statement in a message; its signature is not verified here.

    Raises:
        InvalidInput: a field is missing.
    """
    missing = {name: "must not be empty" for name in ("statement", "signer", "signature") if not getattr(message, name)}
    if missing:
        raise InvalidInput("a signed statement is incomplete", violations=missing)
    return Signed(message.statement, message.signer, message.signature)


def heads_to_proto(
    heads: Iterable[Head], roots: Mapping[Head, Signed] = MappingProxyType({})
) -> list[federation_pb2.LedgerHead]:
    """The messages for what is known of another's ledger; with the roots by which that one said so, where known."""
    messages = []
    for head in heads:
        name = federation_pb2.RoundName(job_id=head.job_id, round=head.round)
        root = signed_to_proto(roots[head]) if head in roots else None
        messages.append(federation_pb2.LedgerHead(digest=head.digest, round=name, root=root))
    return messages


def heads_from_proto(messages: Sequence[federation_pb2.LedgerHead]) -> list[Head]:
    """What the other side says of this one's ledger, told last last.

    Raises:
        InvalidInput: they are too many, or one is no head.
    """
    if len(messages) > HEADS_KEPT:
        raise InvalidInput(f"of a ledger at most {HEADS_KEPT} heads are told")
    return [Head(each.digest, each.round.job_id, each.round.round) for each in messages]


def standing_to_proto(standing: TaskStanding) -> common_pb2.TaskReadiness:
    """The message for how it stands with a task."""
    return common_pb2.TaskReadiness(
        digest=standing.digest, ready=standing.ready, problem=standing.problem, place=standing.place
    )


def standings_from_proto(messages: Mapping[str, common_pb2.TaskReadiness]) -> dict[str, TaskStanding]:
    """How it stands with a party's tasks, by short name: texts of others, which everybody is shown.

    Raises:
        InvalidInput: there are too many, or one is not what it should be.
    """
    found = {task: TaskStanding(each.digest, each.ready, each.problem, each.place) for task, each in messages.items()}
    fine = all(
        _TASK.fullmatch(task)
        and _DIGEST.fullmatch(each.digest)
        and _PROBLEM.fullmatch(each.problem)
        and (not each.place or PLACE.fullmatch(each.place))
        for task, each in found.items()
    )
    if not fine or len(found) > MAX_TASKS:
        text = f"at most {MAX_TASKS} tasks by short name, each with a digest, a class and a place"
        raise InvalidInput(f"what a party is ready for is {text}", violations={"tasks": text})
    return found
