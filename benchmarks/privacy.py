"""What the mechanisms cost."""

from __future__ import annotations

from src.privacy.entropy import SystemEntropy
from src.privacy.noise import discrete_gaussian

from .measure import Figures, cpu_s


def run() -> Figures:
    """The exact discrete Gaussian, a million draws, in milliseconds."""
    entropy = SystemEntropy()

    def draw(sigma: int) -> float:
        return cpu_s(lambda: discrete_gaussian(sigma**2, 1_000_000, entropy=entropy)) * 1e3

    return {f"discrete_gaussian_1m_sigma_{sigma}_ms": draw(sigma) for sigma in (10, 1000, 100_000)}
