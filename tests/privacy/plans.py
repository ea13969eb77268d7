"""Noise plans, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from src.privacy.events import NoiseBy
from src.privacy.noise_plan import NoisePlan, plan_noise

WHO: tuple[NoiseBy, ...] = ("both", "parties", "aggregator")


@st.composite
def noise_plans(draw: st.DrawFn) -> NoisePlan:
    """With noise, on grids on which every share is wide enough for theory; all but one of a quorum may collude."""
    quorum = draw(st.integers(1, 20))
    return plan_noise(
        noise_by=draw(st.sampled_from(WHO)),
        noise_multiplier=draw(st.floats(0.05, 20)),
        sensitivity=draw(st.floats(100, 1e6)),
        quorum=quorum,
        colluders=draw(st.integers(0, quorum - 1)),
    )
