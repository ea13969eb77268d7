"""A model that is handed in before its job: kept for who sent it, within their quota, and for an hour."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from src.communication.generated import jobs_pb2
from src.communication.generated.common_pb2 import DataChunk
from src.communication.identity import Identity
from src.communication.options import MAX_UPLOAD_BYTES
from src.communication.streams import send_bytes
from src.errors import BusyError, DigestError, InvalidInput, LimitError, NotFoundError, SottoError
from src.jobs.computations import EvaluationSpec
from src.jobs.orders import order_of, spec_of_order
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import spec_from_proto, spec_into_proto
from src.jobs.uploads import KEPT_S, MAX_UPLOADS

BOB = Identity("scientist", "bob")
MODEL = bytes(range(256)) * 1000


def sha256(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()


async def upload(house: Any, model: bytes = MODEL, owner: str = "scientist/ann") -> Any:
    return await house.service.uploads.receive(owner, send_bytes(model, chunk_bytes=10_000))


def spec_of(model: bytes, kind: str = "federated_training") -> Any:
    if kind == "evaluation":
        return EvaluationSpec(model_sha256=sha256(model), task="t")
    return FederatedTrainingSpec.from_json({"task": "t", "initial_model_sha256": sha256(model)})


@pytest.mark.parametrize("kind", ["federated_training", "evaluation"])
async def test_a_job_begins_with_the_model_that_its_owner_uploaded_and_with_nobody_elses(house: Any, kind: str) -> None:
    await upload(house)
    with pytest.raises(NotFoundError, match="upload it first") as caught:
        await house.submit(spec_of(MODEL, kind), caller=BOB)
    assert caught.value.metadata["sha256"] == sha256(MODEL)
    view = await house.submit(spec_of(MODEL, kind))
    assert house.blobs.read(sha256(MODEL)) == MODEL
    assert (await house.submit(spec_of(MODEL, kind))).row.job_id == view.row.job_id  # the same request
    with pytest.raises(NotFoundError, match="upload it first"):
        await house.submit(spec_of(MODEL + b"1", kind), "another")


async def test_what_waits_too_long_leaves_the_disk_and_what_a_job_has_taken_stays(house: Any) -> None:
    other = MODEL + b"other"
    await upload(house)
    await upload(house, other)
    await house.submit(spec_of(MODEL))
    house.now += KEPT_S + 10
    house.service.uploads.sweep()
    await house.service._leftovers.settled()
    assert (house.blobs.exists(sha256(MODEL)), house.blobs.exists(sha256(other))) == (True, False)
    with pytest.raises(NotFoundError):
        await house.submit(spec_of(other), "other")
    await house.submit(spec_of(MODEL), "a job of theirs keeps it")


async def test_the_quota_of_a_scientist_counts_uploads_and_what_their_jobs_keep(house: Any) -> None:
    uploads = house.service.uploads
    uploads._settings = replace(uploads._settings, max_stored_bytes_per_scientist=2 * len(MODEL) + 10)
    await upload(house)
    await house.submit(spec_of(MODEL))
    await upload(house)  # the same bytes are one file
    await upload(house, MODEL + b"2")
    with pytest.raises(LimitError, match=r"limits\.max_stored_bytes_per_scientist") as caught:
        await upload(house, MODEL + b"3")
    assert caught.value.metadata["limit"] == "max_stored_bytes_per_scientist"
    assert not house.blobs.exists(sha256(MODEL + b"3"))
    await upload(house, MODEL + b"3", "scientist/bob")


async def test_so_many_may_wait_and_one_is_sent_at_a_time(house: Any) -> None:
    for number in range(MAX_UPLOADS):
        await upload(house, bytes([number]))
    with pytest.raises(LimitError, match="wait for a job already"):
        await upload(house, b"one more")
    await upload(house, bytes([0]))  # the same again
    going_on = asyncio.Event()

    async def slow() -> AsyncIterator[DataChunk]:
        async for chunk in send_bytes(bytes([1])):
            yield chunk
        await going_on.wait()

    first = asyncio.create_task(house.service.uploads.receive("scientist/ann", slow()))
    await asyncio.sleep(0)
    with pytest.raises(BusyError):
        await upload(house, bytes([2]))
    going_on.set()
    await first
    await upload(house, bytes([2]))


CHUNK: dict[str, Any] = {"sha256": hashlib.sha256(MODEL).digest(), "total_bytes": len(MODEL)}
BROKEN: dict[str, tuple[list[DataChunk], type[SottoError]]] = {
    "nothing": ([], InvalidInput),
    "no digest": ([DataChunk(data=MODEL, total_bytes=len(MODEL))], InvalidInput),
    "another digest": ([DataChunk(data=MODEL, total_bytes=len(MODEL), sha256=bytes(32))], DigestError),
    "no size": ([DataChunk(data=MODEL, sha256=CHUNK["sha256"])], LimitError),
    "too large": ([DataChunk(data=MODEL, **CHUNK | {"total_bytes": MAX_UPLOAD_BYTES + 1})], LimitError),
    "too little": ([DataChunk(data=MODEL[:-1], **CHUNK)], DigestError),
    "too much": ([DataChunk(data=MODEL + b"1", **CHUNK)], DigestError),
    "a gap": ([DataChunk(data=MODEL[:9], **CHUNK), DataChunk(data=MODEL[9:], offset=10)], DigestError),
    "an empty chunk": ([DataChunk(data=MODEL[:9], **CHUNK), DataChunk(offset=9)], InvalidInput),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_of_what_is_not_what_was_announced_nothing_stays(house: Any, how: str) -> None:
    chunks, error = BROKEN[how]

    async def stream() -> AsyncIterator[DataChunk]:
        for chunk in chunks:
            yield chunk

    with pytest.raises(error):
        await house.service.uploads.receive("scientist/ann", stream())
    await house.service._leftovers.settled()
    there = [path for path in house.blobs.root.rglob("*") if path.is_file()] if house.blobs.root.is_dir() else []
    assert there == []
    await upload(house)  # and the next one is taken


@pytest.mark.parametrize("kind", ["federated_training", "evaluation"])
def test_the_digest_is_bound_by_the_signed_order(kind: str) -> None:
    """It is in the text that is signed: the specification that parties read is the one that was sent."""
    job = jobs_pb2.Job()
    spec_into_proto(job, spec_of(MODEL, kind))
    assert spec_from_proto(job) == spec_of(MODEL, kind)
    order = order_of(job, federation="f", scientist="ann", request_id="r", expires_at="2030-01-01T00:00:00Z")
    assert spec_of_order(order) == spec_of(MODEL, kind)
    assert spec_of_order(order) != spec_of(MODEL + b"1", kind)


def test_a_job_that_brings_a_model_and_names_one_is_refused() -> None:
    training = jobs_pb2.FederatedTraining(task="t", initial_model=b"m", initial_model_sha256=bytes(32))
    with pytest.raises(InvalidInput, match="give one of the two"):
        spec_from_proto(jobs_pb2.Job(federated_training=training))
    short = jobs_pb2.FederatedTraining(task="t", initial_model_sha256=bytes(31))
    with pytest.raises(InvalidInput, match="initial_model"):
        spec_from_proto(jobs_pb2.Job(federated_training=short))
