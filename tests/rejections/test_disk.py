"""What lies on a real aggregator's disk: of what it refused nothing, of a job at rest its artifact, at once."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest

from src.communication.generated import jobs_pb2
from src.encryption.scheme import Layout
from src.errors import CiphertextError, InvalidInput, PlanError, PolicyError, SottoError
from src.learning.flatten import to_safetensors
from tests.rejections.scripted import COHORT, PATIENCE_S, House

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL = to_safetensors({"w": np.zeros(60, np.float32)})


async def comes_to(house: House, files: set[str]) -> None:
    """Wait until just these lie in the blob store, whole or in part."""
    async with asyncio.timeout(PATIENCE_S):
        while house.files() != files:  # noqa: ASYNC110  it is the aggregator that removes them
            await asyncio.sleep(0.05)


REFUSED: dict[str, tuple[type[SottoError], jobs_pb2.FederatedTraining | jobs_pb2.Evaluation]] = {
    "bytes that are no model": (
        InvalidInput,
        jobs_pb2.FederatedTraining(task="scripted", parties=COHORT, initial_model=os.urandom(1000)),
    ),
    "a party that is not enrolled": (
        InvalidInput,
        jobs_pb2.FederatedTraining(task="scripted", parties=["zoe"], initial_model=MODEL),
    ),
    "a quorum that hides nobody": (
        PlanError,
        jobs_pb2.FederatedTraining(task="scripted", parties=COHORT, quorum=1, initial_model=MODEL),
    ),
    "noise of somebody else than configured": (
        PolicyError,
        jobs_pb2.FederatedTraining(
            task="scripted",
            parties=COHORT,
            initial_model=MODEL,
            party_privacy=jobs_pb2.PartyPrivacy(noise_by="parties"),
        ),
    ),
    "an evaluation of a task that nobody knows": (InvalidInput, jobs_pb2.Evaluation(task="nothing", model=MODEL)),
}


@pytest.mark.parametrize("why", REFUSED)
async def test_no_byte_of_a_refused_job_is_stored(house: House, why: str) -> None:
    error, spec = REFUSED[why]
    before = house.files()
    for _ in range(3):
        with pytest.raises(error):
            await house.client.submit(spec)
        assert house.files() == before


async def test_an_upload_that_is_refused_after_its_last_byte_leaves_the_disk_again(house: House) -> None:
    """Its root is the one that was committed to, and what it has in a ciphertext's place is none."""

    def spoil(whole: bytes, layout: Layout) -> bytes:
        return whole[: -layout.ciphertext_bytes] + bytes(layout.ciphertext_bytes)

    async with house.job() as (_, parties):
        parts = {name: parties[name].prepare(await parties[name].wanted("contribute"), spoil) for name in COHORT}
        for name, part in parts.items():
            await parties[name].commit(part)
        await parties["a"].wanted("reveal")
        before = house.files()
        for _ in range(2):
            with pytest.raises(CiphertextError):
                await parties["a"].upload(parts["a"])
            await house.app._leftovers.settled()
            assert house.files() == before


async def test_of_a_job_at_rest_its_artifact_stays_and_of_one_that_was_cancelled_nothing(house: House) -> None:
    """Initial models, models of earlier rounds, batches, shares: what no file of the artifact is."""
    await comes_to(house, set())
    async with house.job() as (job_id, parties):
        for name, part in {name: await parties[name].contribute() for name in COHORT}.items():
            await parties[name].deliver(part)
        for name in COHORT:
            await parties[name].open()
        job = await house.client.wait(job_id, timeout_s=PATIENCE_S)
        assert job.state == jobs_pb2.SUCCEEDED, job.error
    artifact = {file.sha256.hex() for file in job.result.files}
    assert len(artifact) == 2
    await comes_to(house, artifact)
    async with house.job() as (_, parties):
        await parties["a"].contribute()
        assert house.files() > artifact
    await comes_to(house, artifact)
    await house.client.delete(job_id)
    await comes_to(house, set())
