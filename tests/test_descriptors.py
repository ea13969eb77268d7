"""A role takes all descriptors that the system allows, and keeps half of them from its connections."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from src import descriptors
from tests.conftest import ROOT

CODE = """
import resource, sys
from src.descriptors import descriptor_limit, raise_descriptor_limit, room_for_connections
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
before, after = raise_descriptor_limit()
child = __import__("subprocess").run(["sh", "-c", "ulimit -n"], capture_output=True, text=True).stdout
print(before, after, resource.getrlimit(resource.RLIMIT_NOFILE), room_for_connections(), int(child))
"""


@pytest.mark.parametrize("hard", [64, 500, 1024])
def test_the_soft_limit_is_raised_to_the_hard_one_and_inherited(hard: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(hard)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == f"64 {hard} ({hard}, {hard}) {hard // 2} {hard}", done.stderr


@pytest.mark.parametrize(("limit", "room"), [(64, 32), (1024, 512), (8192, 4096), (1 << 30, 4096), (1, 1)])
def test_connections_get_half_of_the_descriptors_at_most(
    monkeypatch: pytest.MonkeyPatch, limit: int, room: int
) -> None:
    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: limit)
    assert descriptors.room_for_connections() == room


def test_without_a_hard_limit_it_takes_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS says that there is none, and accepts no more than OPEN_MAX."""
    infinity, now = resource.RLIM_INFINITY, [256, resource.RLIM_INFINITY]

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        if not 0 <= limits[0] <= 10_240:
            raise ValueError("current limit exceeds maximum limit")
        now[0] = limits[0]

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert descriptors.raise_descriptor_limit() == (256, 10_240)
    assert descriptors.raise_descriptor_limit() == (10_240, 10_240)
    now[0] = infinity
    assert descriptors.raise_descriptor_limit()[1] == 1 << 20
