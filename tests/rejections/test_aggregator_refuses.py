"""A broken or malicious party against the real aggregator, over mutual TLS: refused by name, and nothing is lost by it.

Each row below is one deviation of party c and the error it gets. After every one the round's row is what it was, and
the blob store holds not one file more.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from src.aggregator.round_row import RoundRow, RoundState
from src.communication.generated import federation_pb2, federation_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from src.communication.grpc_client import connect
from src.encryption.batch import BatchHeader
from src.encryption.scheme import Layout
from src.errors import (
    AccessError,
    BatchError,
    CiphertextError,
    ConflictError,
    DigestError,
    InvalidInput,
    KeyMaterialError,
    LimitError,
    NotFoundError,
    SignatureError,
    SottoError,
    StateError,
    VersionError,
)
from src.learning.flatten import from_safetensors
from src.privacy.entropy import SystemEntropy
from src.protocol.keyring import load_share
from src.protocol.plan import LIST_KIND, ROOT_KIND
from src.protocol.roster import AGGREGATOR
from src.protocol.signing import Signed
from tests.rejections.scripted import House, Opened, Part, ScriptedParty

pytestmark = pytest.mark.asyncio(loop_scope="module")

JobStub = jobs_pb2_grpc.JobServiceStub
PartyStub = federation_pb2_grpc.FederationServiceStub
RESOLUTION_BITS: Final = 16


@dataclass(frozen=True)
class Scene:
    """A round held still: everybody has done their part but c, whose part is ready."""

    house: House
    parties: dict[str, ScriptedParty]
    part: Part
    others: dict[str, Part]
    seen: Opened | None = None

    def __repr__(self) -> str:
        return f"Scene({self.part.name})"

    @property
    def a(self) -> ScriptedParty:
        return self.parties["a"]

    @property
    def b(self) -> ScriptedParty:
        return self.parties["b"]

    @property
    def c(self) -> ScriptedParty:
        return self.parties["c"]

    @property
    def d(self) -> ScriptedParty:
        return self.parties["d"]

    @property
    def opened(self) -> Opened:
        assert self.seen is not None
        return self.seen


Act = Callable[[Scene], Awaitable[Any]]
Row = tuple[str, type[SottoError], Act]


def each(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("error", "act"), [pytest.param(row[1], row[2], id=row[0]) for row in rows])


async def refused(scene: Scene, error: type[SottoError], act: Act) -> SottoError:
    """`act` raises just this error, and the aggregator is left as it was."""
    row, files = await scene.house.row(scene.part.name), scene.house.files()
    with pytest.raises(SottoError) as caught:
        await act(scene)
    assert type(caught.value) is error, caught.value
    assert await scene.house.row(scene.part.name) == row
    assert scene.house.files() == files
    return caught.value


# --- joining and committing -------------------------------------------------------------------------------------------


def signed_root(scene: Scene, *, by: str = "c", kind: str = ROOT_KIND, signer: str = "c", **changes: Any) -> Signed:
    key = scene.parties[by].key
    return key.sign(kind, {**scene.part.statement, **changes}, signer=signer)


def commit(**changes: Any) -> Act:
    return lambda s: s.c.commit(s.part, signed_root(s, **changes))


async def as_scientist(scene: Scene) -> None:
    async with connect(scene.house.address, tls=scene.house.scientist_tls) as channel:
        await PartyStub(channel).DownloadModel(federation_pb2.DownloadModelRequest(round=scene.part.name)).read()


async def as_job_owner(scene: Scene) -> None:
    await JobStub(scene.c.channel).CreateJob(jobs_pb2.CreateJobRequest())


def elsewhere(job_id: str | None = None, number: int = 1) -> Act:
    return lambda s: s.c.commit(
        replace(s.part, name=federation_pb2.RoundName(job_id=job_id or s.part.name.job_id, round=number))
    )


COMMITS: Final[list[Row]] = [
    ("root signed by another party's key", SignatureError, commit(by="b")),
    ("root of another plan", SignatureError, commit(plan="0" * 64)),
    ("root in another party's name", SignatureError, commit(contributor="b")),
    ("root under another party's name as signer", SignatureError, commit(signer="b")),
    ("root in the aggregator's name", SignatureError, commit(contributor=AGGREGATOR, signer=AGGREGATOR)),
    ("another statement than a root", SignatureError, commit(kind=LIST_KIND)),
    (
        "root without a signature",
        SignatureError,
        lambda s: s.c.commit(s.part, replace(s.part.root, signature=bytes(64))),
    ),
    ("root of another number of ciphertexts", InvalidInput, commit(ciphertexts=1)),
    ("root of another length", InvalidInput, commit(body_bytes=1)),
    ("root that is no digest and fills every message it is in", InvalidInput, commit(root="x" * 60_000)),
    ("root with a field too many", InvalidInput, commit(weight=1000)),
    ("a second, different root", ConflictError, lambda s: s.a.commit(s.others["a"], s.a.another_root(s.others["a"]))),
    ("an ε that no JSON holds", InvalidInput, lambda s: s.c.commit(s.part, example_epsilon_spent=math.nan)),
    ("a round that does not exist", NotFoundError, elsewhere(number=2)),
    ("a job that does not exist", NotFoundError, elsewhere("nothing")),
    ("a round without an invitation", NotFoundError, lambda s: s.d.commit(s.part)),
    ("upload before the list is frozen", StateError, lambda s: s.c.upload(s.part)),
    ("asking for the batches of others", NotFoundError, lambda s: s.c.download(s.part.name, "aggregator")),
    ("a scientist in a party's place", AccessError, as_scientist),
    ("a party in a scientist's place", AccessError, as_job_owner),
    ("joining with another signing key", SignatureError, lambda s: s.c.join(verify_key=s.b.key.verify_key)),
    ("joining with half a key", InvalidInput, lambda s: s.c.join(verify_key=b"\0" * 16)),
    ("joining with another public key", KeyMaterialError, lambda s: s.c.join(key_id="0" * 32)),
    ("joining with another roster", KeyMaterialError, lambda s: s.c.join(roster_digest="0" * 64)),
    ("joining with another protocol", VersionError, lambda s: s.c.join(protocol_version="1.0")),
]


@pytest_asyncio.fixture(loop_scope="module", scope="class")
async def committing(house: House) -> AsyncIterator[Scene]:
    """a has committed, c is about to."""
    async with house.job() as (_, parties):
        others = {"a": await parties["a"].contribute()}
        part = parties["c"].prepare(await parties["c"].wanted("contribute"))
        yield Scene(house, parties, part=part, others=others)


class TestCommit:
    @each(COMMITS)
    async def test_refused(self, committing: Scene, error: type[SottoError], act: Act) -> None:
        await refused(committing, error, act)

    async def test_who_was_turned_away_is_told_to_those_who_wait_for_it(self, committing: Scene) -> None:
        with pytest.raises(KeyMaterialError):
            await committing.c.join(roster_digest="0" * 64)
        assert "party c has another roster" in committing.house.app._sessions.refused["c"]


# --- uploading --------------------------------------------------------------------------------------------------------


def header(**changes: Any) -> Act:
    return lambda s: s.c.upload(s.part, header=replace(BatchHeader.decode(s.part.header), **changes).encode())


def body(change: Callable[[bytes], list[bytes]]) -> Act:
    return lambda s: s.c.upload(s.part, body=change(s.part.body))


def raw_header(change: Callable[[bytes], bytes]) -> Act:
    return lambda s: s.c.upload(s.part, header=change(s.part.header))


UPLOADS: Final[list[Row]] = [
    ("one flipped bit", DigestError, body(lambda b: [b[:-1], bytes([b[-1] ^ 1])])),
    ("two ciphertexts swapped", DigestError, body(lambda b: [b[128:256], b[:128], b[256:]])),
    ("another party's bytes", DigestError, lambda s: s.c.upload(s.part, body=[s.others["a"].body])),
    ("one byte too few", DigestError, body(lambda b: [b[:-1]])),
    ("one byte too many", DigestError, body(lambda b: [b, b"\0"])),
    ("no body", DigestError, body(lambda b: [])),
    ("a message larger than the limit", LimitError, body(lambda b: [bytes(100_000)])),
    ("a header longer than any", LimitError, raw_header(lambda h: h + bytes(2000))),
    ("a header cut short", BatchError, raw_header(lambda h: h[:-1])),
    ("a header of another format version", BatchError, raw_header(lambda h: h[:5] + b"\x02" + h[6:])),
    ("a header of another scheme", BatchError, header(scheme="plaintext")),
    ("a header of another slot width", BatchError, header(slot_bits=21)),
    ("a header of another key", BatchError, header(key_id="0" * 32)),
    ("a header of another job", BatchError, header(job_id="other")),
    ("a header of another round", BatchError, header(round_number=2)),
    ("a header of another contributor", BatchError, header(contributor="a")),
    ("a header of another plan", BatchError, header(plan_digest=bytes(32))),
    ("a root that is not on the list", ConflictError, lambda s: s.c.upload(s.part, root=s.c.another_root(s.part))),
    ("another party's root", SignatureError, lambda s: s.c.upload(s.part, root=s.others["a"].root)),
    ("a party that was not invited", NotFoundError, lambda s: s.d.upload(s.part)),
    ("a body without a header", InvalidInput, lambda s: s.c.send([federation_pb2.UploadUpdateRequest(body=b"x")])),
    ("a header twice", InvalidInput, lambda s: s.c.send([s.c.header(s.part), s.c.header(s.part)])),
    ("nothing at all", InvalidInput, lambda s: s.c.send([])),
    ("a root after the list is frozen", ConflictError, lambda s: s.c.commit(s.part, s.c.another_root(s.part))),
    ("shares before anybody asks", SignatureError, lambda s: s.c.send_share_of(s.part)),
    ("a share of nothing", StateError, lambda s: s.c.send_share_of(s.part, aggregate_root="")),
]


@pytest_asyncio.fixture(loop_scope="module", scope="class")
async def uploading(house: House) -> AsyncIterator[Scene]:
    """The list is frozen, a and b have delivered."""
    async with house.job() as (_, parties):
        others = {name: await parties[name].contribute() for name in "ab"}
        part = await parties["c"].contribute()
        for name in "ab":
            await parties[name].deliver(others[name])
        yield Scene(house, parties, part=part, others=others)


class TestUpload:
    @each(UPLOADS)
    async def test_refused(self, uploading: Scene, error: type[SottoError], act: Act) -> None:
        await refused(uploading, error, act)

    async def test_an_upload_that_is_sent_again_is_accepted_and_changes_nothing(self, uploading: Scene) -> None:
        row, files = await uploading.house.row(uploading.part.name), uploading.house.files()
        assert await uploading.a.upload(uploading.others["a"])
        assert await uploading.house.row(uploading.part.name) == row
        assert uploading.house.files() == files


def last(value: Callable[[int], int]) -> Callable[[bytes, Layout, int], bytes]:
    """The body with another last ciphertext, a function of the modulus."""

    def spoil(whole: bytes, layout: Layout, modulus: int) -> bytes:
        return whole[: -layout.ciphertext_bytes] + value(modulus).to_bytes(layout.ciphertext_bytes, "big")

    return spoil


BAD_CIPHERTEXTS: Final = {
    "a": last(lambda n: 0),
    "b": last(lambda n: n * n),
    "c": last(lambda n: 5 * n),
}


async def test_what_is_no_ciphertext_is_named_by_its_index_even_if_its_root_was_committed(house: House) -> None:
    """Zero, n² and a multiple of n, each committed to in good form: uploads fail, and with all three the round."""
    async with house.job() as (_, parties):
        parts = {}
        for name, spoil in BAD_CIPHERTEXTS.items():
            party = parties[name]
            modulus = party.keyring.public.n
            work = await party.wanted("contribute")
            parts[name] = party.prepare(work, lambda b, layout, s=spoil, n=modulus: s(b, layout, n))  # type: ignore[misc]
            await party.commit(parts[name])
        for name, part in parts.items():
            await parties[name].wanted("reveal")
            with pytest.raises(CiphertextError) as caught:
                await parties[name].upload(part)
            assert caught.value.metadata["index"] == str(part.layout.ciphertext_count - 1)
        assert set((await house.row(parts["a"].name)).batches) == set()


async def test_a_party_that_gave_up_cannot_upload_what_the_others_release_without_it(house: House) -> None:
    async with house.job(quorum=2) as (job_id, p):
        part = p["c"].prepare(await p["c"].wanted("contribute"))
        report = {"stage": "contribute", "reason": "BUDGET_EXCEEDED", "message": "no\nbudget\x1b[2J"}
        await p["c"].stub.ReportFailure(federation_pb2.ReportFailureRequest(round=part.name, **report))
        parts = {name: await p[name].contribute() for name in "ab"}
        await p["a"].deliver(parts["a"])
        with pytest.raises(ConflictError):
            await p["c"].upload(part)
        await p["b"].deliver(parts["b"])
        seen = [await p[name].open() for name in "abc"]
        await released(house, job_id, [each.values for each in parts.values()], noise_of(p, seen[0]))
        row = await house.row(part.name)
        assert row.failures["c"].message == "no budget [2J"


# --- opening ----------------------------------------------------------------------------------------------------------


def share(**changes: Any) -> Act:
    return lambda s: s.c.send_share(s.opened, **changes)


def share_as(data: Callable[[bytes], bytes], size: Callable[[int], int] = lambda n: n) -> Act:
    """Other bytes than the signed statement announces."""
    return lambda s: s.c.send_share(s.opened, data(s.opened.share), **announced(s.opened.share, size))


def announced(data: bytes, size: Callable[[int], int]) -> dict[str, Any]:
    return {"sha256": sha256(data).hexdigest(), "bytes": size(len(data))}


SHARES: Final[list[Row]] = [
    ("a share nobody asked for", StateError, lambda s: s.d.send_share(s.opened)),
    ("a share of another aggregate", SignatureError, share(aggregate_root="0" * 64)),
    ("a share in another round", SignatureError, share(plan="0" * 64)),
    ("a share in another party's name", SignatureError, share(party="b")),
    ("a share signed by another key", SignatureError, lambda s: s.c.send_share(s.opened, key=s.b.key)),
    ("a share announced larger than any", LimitError, share(bytes=1 << 30)),
    ("a share announced empty", LimitError, share(bytes=0)),
    ("a share longer than announced", DigestError, share_as(lambda b: b + b"\0")),
    ("a share shorter than announced", DigestError, share_as(lambda b: b[:-1])),
    ("a share with other bytes than announced", DigestError, share_as(lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    ("a second share of the same party", StateError, lambda s: s.a.send_share(s.opened)),
    ("an upload after the fact", StateError, lambda s: s.c.upload(s.part, root=s.c.another_root(s.part))),
    ("batches that do not exist", NotFoundError, lambda s: s.c.download(s.part.name, "d")),
    ("batches it is not asked to open", NotFoundError, lambda s: s.d.download(s.part.name, "a")),
]


@pytest_asyncio.fixture(loop_scope="module", scope="class")
async def opening(house: House) -> AsyncIterator[Scene]:
    """All have delivered, a has sent its share, c's is ready."""
    async with house.job() as (_, parties):
        parts = {name: await parties[name].contribute() for name in "abc"}
        for name, part in parts.items():
            await parties[name].deliver(part)
        await parties["a"].open()
        seen = await parties["c"].look(await parties["c"].wanted("open"))
        yield Scene(house, parties, part=parts["c"], others=parts, seen=seen)


class TestShares:
    @each(SHARES)
    async def test_refused(self, opening: Scene, error: type[SottoError], act: Act) -> None:
        await refused(opening, error, act)

    async def test_a_share_that_is_sent_again_is_accepted_and_changes_nothing(self, opening: Scene) -> None:
        row = await opening.house.row(opening.part.name)
        again = replace(opening.opened, share=opening.a.memory.read(row.shares["a"]))
        assert await opening.a.send_share(again)
        assert await opening.house.row(opening.part.name) == row


def noise_of(parties: dict[str, ScriptedParty], seen: Opened) -> NDArray[np.int64]:
    """What the aggregator's noise batch holds: with the shares of all parties in one hand it can be read."""
    if AGGREGATOR not in seen.batches:
        return np.zeros(1, np.int64)
    return decrypt(parties, seen, seen.batches[AGGREGATOR])


def decrypt(parties: dict[str, ScriptedParty], seen: Opened, batch: bytes) -> NDArray[np.int64]:
    scheme, layout = parties["a"].scheme(seen.plan), seen.layout
    shares = {}
    for party in parties.values():
        own = load_share(party.share_file)
        shares[own.index] = scheme.open_share(layout, own, [batch], binding=b"", entropy=SystemEntropy())
    return np.concatenate(list(scheme.decode(layout, scheme.combine(layout, batch, shares), contributions=1)))


async def released(house: House, job_id: str, updates: list[NDArray[np.int64]], noise: NDArray[np.int64]) -> None:
    """The job succeeds, and its only round released exactly this."""
    job = await house.client.wait(job_id, timeout_s=30)
    assert job.state == jobs_pb2.SUCCEEDED, job.error
    model_of(house, await house.row(federation_pb2.RoundName(job_id=job_id, round=1)), updates, noise)


def model_of(
    house: House,
    row: RoundRow,
    updates: list[NDArray[np.int64]],
    noise: NDArray[np.int64],
    start: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The released model, which is where the round started plus the mean of exactly these integers."""
    assert row.state is RoundState.RELEASED
    assert row.result is not None
    model: NDArray[np.float32] = from_safetensors(house.blobs.read(row.result["model_sha256"]))["w"]
    total = sum(updates, start=noise)
    before = house.initial if start is None else start
    expected = before.astype(np.float64) + total / 2.0**RESOLUTION_BITS / len(updates)
    np.testing.assert_array_equal(model, expected.astype(np.float32))
    return model


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5])
async def test_the_released_model_is_the_initial_one_plus_exactly_the_updates_and_the_noise_that_was_drawn(
    house: House, noise_multiplier: float
) -> None:
    """To the last unit: the parties' encoded updates with their noise shares, and the aggregator's noise batch."""
    async with house.job(noise_multiplier=noise_multiplier) as (job_id, parties):
        parts = {name: await parties[name].contribute() for name in "abc"}
        for name, part in parts.items():
            await parties[name].deliver(part)
        seen = [await parties[name].open() for name in "abc"]
        noise = noise_of(parties, seen[0])
        assert bool(noise.any()) is (noise_multiplier > 0)
        await released(house, job_id, [part.values for part in parts.values()], noise)
        assert {await end_of(parties[name]) for name in "abc"} == {"RELEASED"}


async def end_of(party: ScriptedParty) -> str:
    return str((await party.wanted("ended")).ended.state)


WRONG_SHARES: Final[dict[str, Callable[[Opened, Opened], bytes]]] = {
    "a proof that does not hold": lambda mine, other: mine.share[:-1] + bytes([mine.share[-1] ^ 1]),
    "a wrong partial decryption": lambda mine, other: mine.share[:39] + bytes([mine.share[39] ^ 1]) + mine.share[40:],
    "bytes of no form": lambda mine, other: b"share",
    "another holder's share": lambda mine, other: other.share,
}


async def test_who_sends_a_wrong_share_is_named_and_dropped_and_another_holder_opens_the_round(house: House) -> None:
    """One round for each kind of wrong share, and one for a proof made for another party; d steps in every time."""
    model = None
    async with house.job(rounds=len(WRONG_SHARES) + 1) as (job_id, parties):
        for wrong in [*WRONG_SHARES.values(), None]:
            parts = {name: await parties[name].contribute() for name in "abc"}
            for name, part in parts.items():
                await parties[name].deliver(part)
            other = await parties["a"].open()
            mine = await parties["c"].look(await parties["c"].wanted("open"), "a" if wrong is None else None)
            await parties["c"].send_share(mine, wrong(mine, other) if wrong else None)
            await parties["b"].open()
            await parties["d"].open()
            assert await end_of(parties["d"]) == "RELEASED"
            row = await house.row(mine.name)
            assert {name: failure.reason for name, failure in row.failures.items()} == {"c": "SHARE_INVALID"}
            assert set(row.shares) == {"a", "b", "d"}
            model = model_of(house, row, [part.values for part in parts.values()], np.zeros(1, np.int64), model)
        assert (await house.client.wait(job_id, timeout_s=30)).state == jobs_pb2.SUCCEEDED
