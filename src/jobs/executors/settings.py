"""How many workers a pool has, what each may use, and how they are looked after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ...errors import ConfigError

MAX_WORKERS: Final = 256
"""More processes than the cores of any machine that this is meant for."""

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "size": (1, MAX_WORKERS),
    "min_size": (1, MAX_WORKERS),
    "max_size": (1, MAX_WORKERS),
    "nice": (0, 19),
    "recycle_after": (1, 10**9),
    "idle_s": (0, 10**7),
    "grow_after_s": (0, 10**7),
    "health_interval_s": (0.01, 10**7),
    "health_timeout_s": (0.01, 3600),
    "memory_limit_mb": (16, 2**24),
    "cpu_limit_s": (0.01, 10**8),
}
_WHOLE: Final = {"size", "min_size", "max_size", "nice", "recycle_after", "memory_limit_mb"}
_NONE_ALLOWED: Final = {"memory_limit_mb", "cpu_limit_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Numbers of a `WorkerPool`.

    Attributes:
        size: workers at the start, 1 to 256; as long as there are fewer, a unit that finds none free gets one forked at
            once.
        min_size: workers that stay however long nothing comes, 1 to `size`.
        max_size: workers at most, `size` to 256.
        nice: by how much they yield to the role process, 0 to 19.
        recycle_after: units after which a worker is replaced by a fresh one, so that no library's leak adds up; ≥ 1.
        idle_s: a worker that had nothing to do for so long ends, as long as more than `min_size` are left; ≥ 0.
        grow_after_s: a unit that has waited for so long gets another worker, up to `max_size`; ≥ 0.
        health_interval_s: how often a worker that has nothing to do is asked whether it still answers, ≥ 0.01.
        health_timeout_s: how long its answer may take before it is killed and replaced, 0.01 to 3600.
        memory_limit_mb: private memory that a worker may have, in MiB, ≥ 16; None: as much as there is. A unit that
            asks for more fails. Holds on Linux (RLIMIT_DATA: what is written and not shared, unlike the address space,
            of which torch reserves much and uses little); other systems enforce no such limit.
        cpu_limit_s: CPU time that one unit may use, in s, > 0, rounded up by at most a second; None: as much as it
            takes. The kernel kills a worker that uses more (RLIMIT_CPU).

    Both limits are inherited by processes that a unit starts, each for itself.

    Raises:
        ConfigError: values out of range; `problems` lists each.
    """

    size: int = 3
    min_size: int = 1
    max_size: int = 6
    nice: int = 10
    recycle_after: int = 200
    idle_s: float = 60.0
    grow_after_s: float = 0.5
    health_interval_s: float = 30.0
    health_timeout_s: float = 10.0
    memory_limit_mb: int | None = 8192
    cpu_limit_s: float | None = 3600.0

    def __post_init__(self) -> None:
        problems = [text for name in _RANGES if (text := self._problem(name))]
        if not problems and not self.min_size <= self.size <= self.max_size:
            problems = [
                f"size: must be from min_size to max_size, and {self.size} is not in {self.min_size} … {self.max_size}"
            ]
        if problems:
            raise ConfigError("a worker pool cannot be set up like this", problems=tuple(problems))

    def _problem(self, name: str) -> str:
        value = getattr(self, name)
        low, high = _RANGES[name]
        if value is None and name in _NONE_ALLOWED:
            return ""
        kind = int if name in _WHOLE else (int, float)
        if isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high:
            return ""
        none = ", or nothing" if name in _NONE_ALLOWED else ""
        return f"{name}: must be a {'whole ' if name in _WHOLE else ''}number from {low:g} to {high:g}{none}"
