"""Neither room that protects somebody draws from a generator that is not cryptographically secure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
FORBIDDEN = {
    "random": re.compile(r"(?<![\w.])random\.|\bimport random\b|\bfrom random\b"),
    "numpy.random": re.compile(r"\b(?:np|numpy)\.random\b|\bfrom numpy import .*\brandom\b"),
    "torch": re.compile(r"\btorch\.|\b(?:import|from) torch\b"),
    "gmpy2.random_state": re.compile(r"\brandom_state\b|\bmpz_u?random"),
}
FILES = sorted(path for room in ("privacy", "encryption") for path in (SRC / room).rglob("*.py"))


def code_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_insecure_generator_is_named(path: Path) -> None:
    found = {name for name, pattern in FORBIDDEN.items() if pattern.search(code_of(path))}
    assert not found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x = random.random()", "random"),
        ("import random", "random"),
        ("np.random.default_rng()", "numpy.random"),
        ("torch.randn(3)", "torch"),
        ("gmpy2.random_state(7)", "gmpy2.random_state"),
    ],
)
def test_the_search_finds_what_it_is_for(text: str, name: str) -> None:
    assert FORBIDDEN[name].search(text)
    assert len(FILES) > 5
