"""An aggregator whose parts have ended is no aggregator: it stops, and says which."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from src.aggregator.app import App, _bounds
from src.aggregator.servicers.jobs import LONGEST_WATCH_S
from src.config import AggregatorConfig
from src.config_sections import AggregatorLimits
from src.errors import UnavailableError


def test_what_a_caller_may_have_is_configured_and_a_watch_has_an_end() -> None:
    limits = AggregatorLimits(max_streams_per_caller=9, max_requests_per_caller=10, idle_timeout_s=11.0)
    bounds = _bounds(cast(AggregatorConfig, SimpleNamespace(limits=limits)))
    assert (bounds.streams, bounds.requests, bounds.silence_s) == (9, 10, 11.0)
    assert bounds.lifetimes_s == {"/sotto.v1.JobService/WatchJob": LONGEST_WATCH_S}


class Server:
    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def ended(self) -> None:
        await self.over.wait()


def parts() -> Any:
    """What `App.watch` looks at."""
    return SimpleNamespace(_server=Server(), _loop=asyncio.create_task(asyncio.sleep(3600)))


async def test_an_aggregator_that_works_is_watched_for_as_long_as_it_does() -> None:
    app = parts()
    task = asyncio.create_task(App.watch(cast(App, app)))
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    app._loop.cancel()
    await asyncio.gather(task, app._loop, return_exceptions=True)


@pytest.mark.parametrize(("part", "words"), [("server", "its server"), ("loop", "what drives its jobs")])
async def test_the_end_of_a_part_is_the_end_of_the_aggregator(part: str, words: str) -> None:
    """A process that answers nobody, or drives no job, looks well to whoever only looks whether it is there."""
    app = parts()
    task = asyncio.create_task(App.watch(cast(App, app)))
    await asyncio.sleep(0)
    if part == "server":
        app._server.over.set()
    else:
        app._loop.cancel()
    with pytest.raises(UnavailableError, match=f"{words} has ended by itself"):
        await asyncio.wait_for(task, 30)
    app._loop.cancel()
    await asyncio.gather(app._loop, return_exceptions=True)
