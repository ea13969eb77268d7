"""Ids in requests: each has a shape, and is looked at before anything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from google.longrunning import operations_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from src.aggregator.servicers.ids import IDS, check_ids
from src.communication.generated import budget_pb2, federation_pb2, jobs_pb2
from src.errors import InvalidInput

FILES: Final = (federation_pb2, jobs_pb2, budget_pb2, operations_pb2)
REQUESTS: Final = sorted(
    {
        method.input_type.full_name: method.input_type
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }.values(),
    key=lambda each: each.full_name,
)

OTHERS: Final = {
    "sotto.v1.JoinRequest.DeclaredRowsEntry.key": "a task's name: Join checks all that is declared",
    "sotto.v1.JoinRequest.TasksEntry.key": "a task's name: what is no short one is refused with its message",
    "sotto.v1.TellReadinessRequest.TasksEntry.key": "likewise",
    "sotto.v1.TaskReadiness.digest": "of a closed form: any other is refused",
    "sotto.v1.TaskReadiness.problem": "likewise",
    "sotto.v1.TaskReadiness.place": "likewise",
    "sotto.v1.ReportFailureRequest.problem": "of a closed list, or taken for none",
    "sotto.v1.ReportFailureRequest.place": "of a closed form, or taken for none",
    "sotto.v1.ReportFailureRequest.reason": "a party's own words, cut and printed: a failure must not go unheard",
    "sotto.v1.ReportFailureRequest.message": "likewise",
    "sotto.v1.ReportFailureRequest.stage": "likewise",
    "sotto.v1.ListJobsRequest.page_token": "opaque: its parser refuses what it did not write",
    "sotto.v1.ListJobsRequest.filter": "a language with a parser, which has its own limits",
    "sotto.v1.ListJobsRequest.order_by": "likewise",
    "sotto.v1.ListEntriesRequest.page_token": "opaque: its parser refuses what it did not write",
    "google.longrunning.ListOperationsRequest.page_token": "likewise",
    "google.longrunning.ListOperationsRequest.filter": "a language with a parser, which has its own limits",
    "sotto.v1.Job": "a specification: its model checks every field and names each by its path",
}
"""Texts that are no ids (and messages of which none is one), each with its reason."""


def texts(descriptor: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldDescriptor]]:
    """Every field of text in a message, and in those inside it."""
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (*path, field.name), field
        elif field.message_type is not None and field.message_type.full_name not in OTHERS:
            yield from texts(field.message_type, (*path, field.name))


def test_every_text_in_a_request_is_an_id_with_a_shape_or_has_a_reason() -> None:
    """Also those of methods that are still to be written."""
    found = {field.full_name for request in REQUESTS for _, field in texts(request)}
    assert found - IDS.keys() - OTHERS.keys() == set()
    assert (IDS.keys() | OTHERS.keys()) - found - {"sotto.v1.RoundName.round", "sotto.v1.Job"} == set()


def filled(descriptor: Descriptor, path: tuple[str, ...], value: Any) -> Message:
    """A request whose field at `path` is `value`, and whose other ids are in order."""
    message = GetMessageClass(descriptor)()
    place: Any = message
    for name in path[:-1]:
        field = place.DESCRIPTOR.fields_by_name[name]
        place = getattr(place, name).add() if field.is_repeated else getattr(place, name)
        place.SetInParent()
    fine(message)
    setattr(place, path[-1], value)
    return message


FINE: Final = {
    "job_id": "0123456789abcdef",
    "round": 1,
    "contributor": "aggregator",
    "request_id": "6f1f…",
    "file": "model.safetensors",
}


def fine(message: Message) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.full_name in IDS and field.name in FINE:
            value = FINE[field.name]
            setattr(message, field.name, str(value) if field.type == FieldDescriptor.TYPE_STRING else value)
        elif field.message_type is not None and field.message_type.full_name not in OTHERS:
            if field.is_repeated:
                for each in getattr(message, field.name) if not field.message_type.GetOptions().map_entry else ():
                    fine(each)
            elif message.HasField(field.name):
                fine(getattr(message, field.name))


ILL_FORMED: Final = (
    "a" * 4_000_000,
    *(f"a{each}b" for each in ("\0", "\n", "\x1b[2J", "\x7f", "\u200b", "\u2028", "\u202e")),
)
"""Too long, or with what no name has in it: control characters, and what turns the direction of a line."""


@pytest.mark.parametrize(
    ("request_type", "path"),
    [
        pytest.param(request, path, id=f"{request.name}.{'.'.join(path)}")
        for request in REQUESTS
        for path, field in texts(request)
        if field.full_name in IDS
    ],
)
def test_an_id_that_is_none_is_refused_by_its_path_and_not_quoted(
    request_type: Descriptor, path: tuple[str, ...]
) -> None:
    check_ids(filled(request_type, path, str(FINE.get(path[-1], ""))))
    for text in ILL_FORMED:
        with pytest.raises(InvalidInput) as caught:
            check_ids(filled(request_type, path, text))
        (where,) = caught.value.violations
        assert where.replace("[0]", "") == ".".join(path)
        assert len(caught.value.message) < 200
        assert caught.value.message.isprintable()
        assert caught.value.message.isascii()


@pytest.mark.parametrize("number", [0, -1, 2**31, 2**63 - 1])
def test_a_round_has_a_number_that_a_database_can_hold(number: int) -> None:
    name = federation_pb2.RoundName(job_id="job", round=number)
    with pytest.raises(InvalidInput, match=r"round\.round: must be 1 to"):
        check_ids(federation_pb2.DownloadModelRequest(round=name))
    good = federation_pb2.RoundName(job_id="job", round=1)
    with pytest.raises(InvalidInput, match=r"in_hand\[1\]\.round: must be 1 to"):
        check_ids(federation_pb2.StreamAssignmentsRequest(in_hand=[good, name]))


def test_what_everybody_sends_is_fine() -> None:
    check_ids(federation_pb2.JoinRequest(protocol_version="2.0", software_version="Sotto 0.1.0 (Node 22)"))
    check_ids(federation_pb2.UploadUpdateRequest(body=b"x"))
    check_ids(operations_pb2.GetOperationRequest(name="operations/0123456789abcdef"))
    check_ids(budget_pb2.GetBudgetRequest(unit="party", subject="user:ada@example.org"))
    check_ids(budget_pb2.ListEntriesRequest())
    check_ids(jobs_pb2.GetStatusRequest())
    job = jobs_pb2.Job(federated_training=jobs_pb2.FederatedTraining(task="randhie", parties=["a"]))
    check_ids(jobs_pb2.CreateJobRequest(request_id="6f1f2f1e-7c0a-4b56-9ef0-1d0ef7a3c001", job=job))
