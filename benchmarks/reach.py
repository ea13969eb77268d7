"""Whether figures reach what they are to reach, or what is known of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

HOLDS: Final[dict[str, Callable[[float, float], bool]]] = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


def problems(
    figures: Mapping[str, float], reach: Mapping[str, tuple[str, float]], shortfalls: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What does not hold, one sentence each.

    Args:
        figures: as they were measured.
        reach: what they are to reach, by name: a comparison and a value.
        shortfalls: of which is known that they do not; `at`: what they reach all the same, `reason`: why.
    """
    found = []
    for name, (comparison, asked) in reach.items():
        if name not in figures:
            found.append(f"{name} was not measured")
            continue
        known = shortfalls.get(name)
        allowed = asked if known is None else float(known["at"])
        if not HOLDS[comparison](figures[name], allowed):
            listed = "and is not listed" if known is None else f"worse than listed ({comparison} {allowed:,})"
            found.append(f"{name} is {figures[name]:,.3f}, not {comparison} {asked:,}, {listed}")
    return found
