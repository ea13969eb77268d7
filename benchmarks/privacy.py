"""What the mechanisms cost, beside OpenDP."""

from __future__ import annotations

from typing import Final

from src.privacy.accounting import calibrate_dp_sgd, calibrate_sampled_sum
from src.privacy.entropy import SystemEntropy
from src.privacy.noise import discrete_gaussian

from .measure import Figures, cpu_s, say
from .peers import peer

DRAWS: Final = 1_000_000
WIDTHS: Final = (10, 1000, 100_000)
NARROW: Final = (1, 10, 100, 1000)
"""Widths up to σ = 1 000, for which others draw from tables."""
COMPARED: Final = 1000
"""σ at which OpenDP is measured; its time hardly depends on it."""
OPENDP_DRAWS: Final = 50_000
"""Of a peer that needs ten microseconds for each."""

REACH: Final[dict[str, tuple[str, float]]] = {"sampler_vs_opendp": ("≥", 10)}
"""What is to be reached: at least, or at most."""


def opendp_us(sigma: int) -> float | None:
    """OpenDP's exact Gaussian of an integer vector, in microseconds a draw; None where it cannot be had."""
    if not all(peer(module) for module in ("wrapt", "deprecated")):  # what OpenDP's Python side needs
        return None
    opendp = peer("opendp.prelude")
    if opendp is None:
        return None
    opendp.enable_features("contrib")
    space = opendp.vector_domain(opendp.atom_domain(T=int)), opendp.l2_distance(T=float)
    measurement = opendp.m.make_gaussian(*space, scale=float(sigma))
    zeros = [0] * OPENDP_DRAWS
    return cpu_s(lambda: measurement(zeros)) / OPENDP_DRAWS * 1e6


def run() -> Figures:
    """The exact discrete Gaussian, a million draws, in milliseconds; its ratio to OpenDP's; calibrations in seconds."""
    entropy = SystemEntropy()

    def draw_ms(sigma: int) -> float:
        return cpu_s(lambda: discrete_gaussian(sigma**2, DRAWS, entropy=entropy)) * 1e3

    taken = {sigma: draw_ms(sigma) for sigma in sorted({*WIDTHS, *NARROW})}
    figures = {f"discrete_gaussian_1m_sigma_{sigma}_ms": taken[sigma] for sigma in WIDTHS}
    say("sampler_table_1m_ms is the slowest width up to σ = 1000 of the exact sampler: there is no table")
    figures["sampler_table_1m_ms"] = max(taken[sigma] for sigma in NARROW)
    theirs = opendp_us(COMPARED)
    if theirs is not None:
        figures["opendp_gaussian_1m_ms"] = theirs * DRAWS / 1e3
        figures["sampler_vs_opendp"] = figures["opendp_gaussian_1m_ms"] / taken[COMPARED]
    target = {"epsilon": 1.0, "delta": 1e-5, "sampling_rate": 0.02}
    figures["calibrate_dp_sgd_s"] = cpu_s(lambda: calibrate_dp_sgd(**target, steps=500))
    figures["calibrate_sampled_sum_s"] = cpu_s(
        lambda: calibrate_sampled_sum(**target, rounds=500, dimension=1000, tau_of=None)
    )
    return figures
