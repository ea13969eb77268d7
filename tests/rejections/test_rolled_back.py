"""A database that was put back to an old copy: found when its role meets the other, which remembers a head of it.

Nothing is charged, trained or sent on top of a ledger that lacks what it once had, until its operator has entered a
correction that names what is lost.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from src import cli
from src.communication.generated import federation_pb2
from src.communication.messages import signed_from_proto, signed_to_proto
from src.errors import InvalidInput, LedgerError
from src.protocol.plan import ROOT_KIND, TRANSCRIPT_KIND, RootStatement
from src.protocol.signing import Signed, open_signed
from src.storage.heads import HEADS_KEPT
from tests.rejections.cheating import Meeting, PartyA
from tests.rejections.scripted import House


def copy_of(a: PartyA, to: Path) -> Path:
    """The party's database as it is now, as a backup would have it."""
    with closing(sqlite3.connect(a.config.state_dir / "party.sqlite")) as now, closing(sqlite3.connect(to)) as then:
        now.backup(then)
    return to


def put_back(copy: Path, a: PartyA) -> None:
    for left in a.config.state_dir.glob("party.sqlite-*"):
        left.unlink()
    shutil.copy(copy, a.config.state_dir / "party.sqlite")


async def ended(meeting: Meeting) -> BaseException | None:
    """What the node ends with, once it is started again."""
    await meeting.a.start()
    async with asyncio.timeout(30):
        (error,) = await asyncio.gather(meeting.a._task, return_exceptions=True)
    await meeting.a._database.close()
    assert error is None or isinstance(error, BaseException)
    return error


async def kept_out(meeting: Meeting, caplog: pytest.LogCaptureFixture) -> str:
    """What the node says once it is started again, and waits for; work that is offered it does not take."""
    caplog.clear()
    joined = len(meeting.them.joined)
    await meeting.a.start()
    async with asyncio.timeout(30):
        while len(meeting.them.joined) < joined + 3:  # noqa: ASYNC110  # it asks again and again
            await asyncio.sleep(0.01)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert not meeting.a._task.done()
    await meeting.a.stop()
    return line


@pytest.mark.parametrize("moment", ["before the round", "between commit and reveal"])
async def test_a_party_with_a_rolled_back_database_does_nothing_until_what_is_lost_is_named(
    meeting: Meeting,
    kits: Path,
    tmp_path: Path,
    moment: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its node ends where its own signature says that it had an entry which is gone; where only the aggregator says so,
    which may lie, it stays and waits."""
    a, them = meeting.a, meeting.them
    if moment == "between commit and reveal":
        round_ = await meeting.committed()
    copy = copy_of(a, tmp_path / "copy")
    if moment == "before the round":
        round_ = await meeting.committed()
    answer = await them.ask_reveal(round_, them.freeze(round_))
    assert answer.kind == "upload"
    told = them.party_ledger[-1]
    assert (told.round.job_id, told.round.round) == ("job", 1)
    await a.stop()
    put_back(copy, a)

    if moment == "before the round":
        error = await ended(meeting)
        assert type(error) is LedgerError
        said = error.message
    else:
        said = await kept_out(meeting, caplog)
    assert told.digest in said
    for word in ("round 1 of job job", "rolled back", "newest copy", "sotto budget set"):
        assert word in said
    assert [answer.kind for answer in them.received] == ["root", "upload"]

    # The way out, as the message says it: the operator answers for what is lost, and the ledger keeps the answer.
    kit = Path(shutil.copytree(kits / "party-a", tmp_path / "kit"))
    text = (kit / "party.yaml").read_text()
    (kit / "party.yaml").write_text(re.sub("(?m)^state_dir:.*", f"state_dir: {a.config.state_dir}", text))
    reason = f"the newest copy is lost: {told.digest}"
    arguments = ["budget", "set", "--config", str(kit / "party.yaml"), "--unit", "party"]
    arguments += ["--subject", "federation:demo", "--max-rounds", "48", "--reason", reason]
    assert await asyncio.to_thread(cli.run, arguments) == 0
    capsys.readouterr()
    await a.start()
    await meeting.committed(number=2)  # and that one is known, as every head of a ledger that nobody touched
    assert them.party_ledger[-1].digest != told.digest


async def test_what_a_party_signs_says_where_its_ledger_was(meeting: Meeting) -> None:
    """In the root before it is told, with the final charge in it; with the upload once what it shows is entered."""
    round_ = await meeting.committed()
    signed = open_signed(round_.roots["a"], ROOT_KIND, verify_key=meeting.them.roster.verify_key("a"))
    entries = await meeting.a.entries()
    assert entries[-1].kind == "final"
    assert RootStatement.from_statement(signed).ledger_head == entries[-1].digest
    answer = await meeting.them.ask_reveal(round_, meeting.them.freeze(round_))
    assert answer.kind == "upload"
    shown = [entry.digest for entry in await meeting.a.entries() if entry.kind == "release"]
    assert meeting.them.party_ledger[-1].digest == shown[-1]


async def test_a_party_tells_the_aggregator_the_last_head_that_a_transcript_of_its_ledger_had(meeting: Meeting) -> None:
    a, them = meeting.a, meeting.them
    round_, _ = await meeting.delivered()
    assert [list(request.aggregator_ledger) for request in them.joined] == [[]]
    transcript = them.sign(TRANSCRIPT_KIND, {"ledger_head": "c" * 64})
    ended = federation_pb2.RoundEnded(state="RELEASED", transcript=signed_to_proto(transcript))
    await them.tell(round_.name, ended=ended)
    async with asyncio.timeout(30):
        while await a.open_rounds():
            await a.idle()
    await meeting.restart()
    await meeting.committed(number=2)
    assert list(them.joined[-1].aggregator_ledger) == [head("c" * 64, number=1)]


def head(digest: str, *, number: int = 3, job_id: str = "job") -> federation_pb2.LedgerHead:
    return federation_pb2.LedgerHead(digest=digest, round=federation_pb2.RoundName(job_id=job_id, round=number))


@pytest.mark.asyncio(loop_scope="module")
async def test_the_aggregator_remembers_the_last_head_that_each_party_told(house: House) -> None:
    async with house.job() as (job_id, parties):
        a, b = parties["a"], parties["b"]
        part = a.prepare(await a.wanted("contribute"))
        root = a.key.sign(ROOT_KIND, {**part.statement, "ledger_head": "a" * 64}, signer="a")
        await a.commit(part, root)
        (told,) = (await a.join()).party_ledger
        assert (told.digest, told.round.job_id, told.round.round) == ("a" * 64, job_id, 1)
        assert not (await b.join()).party_ledger
        await asyncio.gather(b.contribute(), parties["c"].contribute())
        await a.wanted("reveal")
        first = a.header(part, root=root)
        first.header.ledger_head = "x" * 64
        with pytest.raises(InvalidInput):
            await a.send([first])
        first.header.ledger_head = "b" * 64
        rest: list[Any] = [federation_pb2.UploadUpdateRequest(body=part.body)]
        assert await a.send([first, *rest])
        await a.commit(part, root)  # said again, as after a lost answer: it is older than what was told since
        assert [told.digest for told in (await a.join()).party_ledger] == ["b" * 64]


@pytest.mark.asyncio(loop_scope="module")
async def test_an_aggregator_refuses_a_party_that_has_seen_a_head_which_its_ledger_never_had(house: House) -> None:
    known = await house.app._database.run(house.app._accounts.head)
    async with house.parties() as parties:
        await parties["a"].join(aggregator_ledger=[head(known)])
        with pytest.raises(LedgerError, match=r"aggregator's ledger.*rolled back"):
            await parties["a"].join(aggregator_ledger=[head("e" * 64), head(known)])
        assert house.app._sessions.refused["a"] == "the aggregator's ledger lacks an entry that a knows of"
        for wrong in ([head("not a digest")], [head(known, job_id="\n")], [head(known)] * (HEADS_KEPT + 1)):
            with pytest.raises(InvalidInput):
                await parties["a"].join(aggregator_ledger=wrong)


def made_up(meeting: Meeting) -> dict[str, federation_pb2.LedgerHead]:
    """Heads that a's ledger never had, each with another proof that is none."""
    lie = head("d" * 64, number=1)
    b = meeting.them.keys["b"]
    statement = {"plan": "0" * 64, "contributor": "b", "root": "0" * 64, "ciphertexts": 1, "body_bytes": 1, "proof": ""}
    forged = b.sign(ROOT_KIND, {**statement, "ledger_head": "d" * 64}, signer="a")
    true = meeting.them.told_by["job"]
    tampered = Signed(true.statement.replace(b'"proof"', b'"prooF"'), "a", true.signature)
    found = {"no root": lie}
    for name, root in {
        "another party's root": forged,
        "a's root, which says another": true,
        "a false one": tampered,
    }.items():
        found[name] = federation_pb2.LedgerHead(digest=lie.digest, round=lie.round, root=signed_to_proto(root))
    return found


@pytest.mark.parametrize("name", ["no root", "another party's root", "a's root, which says another", "a false one"])
async def test_an_aggregator_that_makes_up_a_head_keeps_a_party_from_work_and_ends_no_node(
    meeting: Meeting, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    await meeting.committed()
    honest = meeting.them.party_ledger
    meeting.them.party_ledger = [made_up(meeting)[name]]
    await meeting.a.stop()
    said = await kept_out(meeting, caplog)
    assert "no work is done as long as the aggregator says so" in said
    meeting.them.party_ledger = honest
    await meeting.a.start()
    await meeting.committed(number=2)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_aggregator_shows_a_party_the_roots_by_which_it_told_its_heads(house: House) -> None:
    async with house.job() as (job_id, parties):
        a = parties["a"]
        part = a.prepare(await a.wanted("contribute"))
        root = a.key.sign(ROOT_KIND, {**part.statement, "ledger_head": "a" * 64}, signer="a")
        await a.commit(part, root)
        (told,) = [each for each in (await a.join()).party_ledger if each.round.job_id == job_id]
        assert signed_from_proto(told.root) == root
