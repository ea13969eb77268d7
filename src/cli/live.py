"""A job followed on a terminal: redrawn with every event, and between events as often as it is looked at."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from ..client import AsyncSottoClient, Job, JobEvent
from ..errors import DeadlineError

LOOK_EVERY_S: Final = 1.0
"""What a job does between two events (bytes that arrive, parties that train) is asked for so often."""
AWAY_AFTER_S: Final = 2.0
"""After so long without an answer the view says that it waits for the aggregator."""

Show = Callable[[Job, list[JobEvent], str], None]


def watch_live(config: Path, job_id: str, *, timeout_s: float | None = None) -> Job:
    """Follow a job on this terminal until it is at rest; returns it as it is then.

    Raises:
        DeadlineError: it was not at rest in time.
        NotFoundError: no such job; UnavailableError: the aggregator stayed away.
    """
    from rich.live import Live

    from ..logs import tidy_last_resort
    from .jobs_view import live_view

    tidy_last_resort()
    with Live(refresh_per_second=4) as live:

        def show(job: Job, events: list[JobEvent], trouble: str) -> None:
            live.update(live_view(job, events, trouble=trouble))

        return asyncio.run(_connect_and_follow(config, job_id, show, timeout_s=timeout_s))


async def _connect_and_follow(config: Path, job_id: str, show: Show, *, timeout_s: float | None) -> Job:
    try:
        async with AsyncSottoClient.from_config(config) as client, asyncio.timeout(timeout_s):
            return await follow(client, job_id, show)
    except TimeoutError:
        raise DeadlineError(f"job {job_id} is not at rest after {timeout_s:g} s", job_id=job_id) from None


async def follow(client: AsyncSottoClient, job_id: str, show: Show, *, look_every_s: float = LOOK_EVERY_S) -> Job:
    """Show a job, its events, and what is in the way of news, until it is at rest; then once more, and return it."""
    events: list[JobEvent] = []
    news = asyncio.Event()
    watching = asyncio.create_task(_collect(client, job_id, events, news))
    try:
        job = await client.get(job_id)
        show(job, events, "")
        while not watching.done():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), look_every_s)
            news.clear()
            job = await _look(client, job, events, show)
        await watching  # raises what ended it
        job = await client.get(job_id)
        show(job, events, "")
        return job
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _look(client: AsyncSottoClient, job: Job, events: list[JobEvent], show: Show) -> Job:
    """The job as it is now; what was known of it stays in view while the aggregator does not answer."""
    looking = asyncio.create_task(client.get(job.job_id))
    try:
        done, _ = await asyncio.wait({looking}, timeout=AWAY_AFTER_S)
        if not done:
            show(job, events, "the aggregator does not answer; waiting for it to come back")
        job = await looking
    finally:
        looking.cancel()
    show(job, events, "")
    return job


async def _collect(client: AsyncSottoClient, job_id: str, events: list[JobEvent], news: asyncio.Event) -> None:
    try:
        async with aclosing(client.watch(job_id)) as heard:
            async for event in heard:
                events.append(event)
                news.set()
    finally:
        news.set()
