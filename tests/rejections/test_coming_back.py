"""Whoever is cut off or started again comes back and works on: in every custody, with a kit and without one. What a
role learns at its first meeting is no reason to refuse, or to be refused, at the second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from src.party import standing
from tests.rejections.whole import SET_UPS, Whole


def cut_off(address: str) -> int:
    """Break every connection to a listening address of this process; how many there were."""
    port, broken = int(address.rpartition(":")[2]), 0
    for path in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:  # closed meanwhile, no socket, not connected
            descriptor = os.dup(int(path.name))
            held.callback(os.close, descriptor)
            found = socket.socket(fileno=descriptor)
            held.callback(found.detach)
            found.getpeername()
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port:
                found.shutdown(socket.SHUT_RDWR)
                broken += 1
    return broken


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(standing, "LONGEST_PAUSE_S", 0.1)


@pytest.mark.parametrize("set_up", SET_UPS)
async def test_every_role_that_is_cut_off_or_started_again_works_on(
    set_up: str, tmp_path: Path, reserved_address: Callable[[], AbstractContextManager[str]]
) -> None:
    with reserved_address() as address:
        whole = Whole(tmp_path, address, set_up=set_up)
        a, b = whole.parties.values()
        await whole.start_aggregator()
        try:
            await asyncio.gather(a.start(), b.start())
            await whole.works()
            assert cut_off(address)
            await whole.works()
            await whole.app.stop()
            await whole.start_aggregator()
            await whole.works()
            await asyncio.gather(a.stop(), b.stop())
            await asyncio.gather(a.start(), b.start())
            await whole.works()
        finally:
            await asyncio.gather(a.stop(), b.stop())
            await whole.app.stop()
