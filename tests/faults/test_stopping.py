"""Roles that are told to stop stop, all at once, and also when the other end goes away in the same moment."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from src.communication.generated import federation_pb2
from src.errors import UnavailableError
from src.party.accounts import PartyAccounts
from src.party.home import Home
from src.party.node import Node
from src.party.rounds import RoundWorker
from src.party.store import RoundMemory
from src.protocol.roster import AGGREGATOR
from src.storage.database import Database

PATIENCE_S = 100.0
"""Only a hang reaches it."""
MOMENTS = range(8)
"""Turns of the event loop between the end of the stream and the order to stop; more than the way between them has."""


class Channel:
    """An aggregator that takes a party in, and then falls silent until it breaks."""

    def __init__(self) -> None:
        self.listening = asyncio.Event()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def unary_unary(self, *_: Any, **__: Any) -> Any:
        async def call(_request: Any) -> federation_pb2.JoinResponse:
            return federation_pb2.JoinResponse(heartbeat_interval_s=30)

        return call

    def unary_stream(self, *_: Any, **__: Any) -> Any:
        return self._assignments

    def stream_unary(self, *_: Any, **__: Any) -> Any:
        return None

    async def _assignments(self, _request: Any) -> AsyncIterator[federation_pb2.Assignment]:
        self.listening.set()
        await self.broken
        yield federation_pb2.Assignment()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_stop_is_not_lost_when_the_stream_breaks_at_the_same_time(moment: int, tmp_path: Path) -> None:
    channel = Channel()

    async def no_rounds(_: Any) -> list[Any]:
        return []

    home = SimpleNamespace(
        introduction=federation_pb2.JoinRequest,
        aggregator_key="",
        accept=lambda _: None,
        signed_heads=lambda _: [],
        config=SimpleNamespace(server=SimpleNamespace(address="nowhere"), state_dir=tmp_path),
        fingerprint=dict,
        check_certificate=lambda: None,
        keyring=SimpleNamespace(key_id="k"),
    )
    node = Node(
        home=cast(Home, home),
        database=cast(Database, SimpleNamespace(run=no_rounds)),
        memory=cast(RoundMemory, SimpleNamespace(open_rounds=None)),
        accounts=cast(PartyAccounts, SimpleNamespace(aggregator_head=None)),
        worker=cast(RoundWorker, SimpleNamespace(check_room=lambda: None)),
        dial=lambda: cast(grpc.aio.Channel, channel),
    )
    task = asyncio.create_task(node.run())
    await channel.listening.wait()
    channel.broken.set_exception(UnavailableError("the aggregator is gone"))
    for _ in range(moment):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
    assert done
    assert task.cancelled()


def test_roles_that_are_told_to_stop_end_with_0_in_the_middle_of_a_round_and_leave_nobody_behind(pair: Any) -> None:
    federation, processes = pair.federation, pair.federation.processes
    with processes.hold("a", "b"):
        job_id = pair.submit()
        federation.reached(job_id, lambda row: row.state == "TRAINING", "the parties train")
        family = [each for name in (AGGREGATOR, "a", "b") for each in processes.all_of(name)]
        # A role, its zygote, its workers: one a party, two for the aggregator; and perhaps one that tries a task.
        assert len(family) >= 3 + 3 + 4
        stopping = [processes.running.pop(name) for name in ("b", "a", AGGREGATOR)]
        for process in stopping:  # all at once, as a machine that goes down does it
            process.send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE_S) for process in stopping] == [0, 0, 0]
        processes.ended(family, "all are gone")
