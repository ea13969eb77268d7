"""Clipping: never longer than C, direction kept, short updates untouched."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from src.errors import InvalidInput
from src.privacy.clipping import clip

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
VECTORS = arrays(np.float32, st.integers(1, 40), elements=FINITE)


def exact_squared_norm(vector: NDArray[np.float32]) -> Fraction:
    return sum((Fraction(float(value)) ** 2 for value in vector), Fraction(0))


@settings(deadline=None, max_examples=150)
@given(update=VECTORS, clipping_norm=st.floats(1e-3, 1e6))
def test_a_clipped_update_is_never_longer_than_the_clipping_norm(
    update: NDArray[np.float32], clipping_norm: float
) -> None:
    """In exact arithmetic: rounding to float32 must not push it over."""
    clipped = clip(update, clipping_norm)
    assert clipped.dtype == np.float32
    assert exact_squared_norm(clipped) <= Fraction(clipping_norm) ** 2


@settings(deadline=None, max_examples=60)
@given(update=arrays(np.float32, 20, elements=st.floats(-1, 1, width=32)), scale=st.floats(1.5, 1e3))
def test_clipping_keeps_the_direction_and_loses_almost_nothing(update: NDArray[np.float32], scale: float) -> None:
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm < 1e-3:
        return
    clipped = clip(update, norm / scale).astype(np.float64)
    assert np.allclose(clipped, update / scale, rtol=1e-6, atol=1e-9)


def test_a_short_update_comes_back_equal_and_as_a_copy() -> None:
    update = np.array([0.3, -0.4], dtype=np.float32)
    clipped = clip(update, 1.0)
    assert (clipped == update).all()
    assert clipped is not update
    assert clip(np.zeros(3, dtype=np.float32), 1.0).tolist() == [0.0, 0.0, 0.0]
    assert clip(np.zeros(0, dtype=np.float32), 1.0).shape == (0,)


REJECTED = {
    "nan": (np.array([1.0, 123456.0, np.nan], dtype=np.float32), 1.0),
    "infinity": (np.array([123456.0, np.inf], dtype=np.float32), 1.0),
    "float64": (np.array([1.0]), 1.0),
    "matrix": (np.ones((2, 2), dtype=np.float32), 1.0),
    "norm zero": (np.ones(2, dtype=np.float32), 0.0),
    "norm negative": (np.ones(2, dtype=np.float32), -1.0),
    "norm infinite": (np.ones(2, dtype=np.float32), float("inf")),
    "norm nan": (np.ones(2, dtype=np.float32), float("nan")),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_clipped_is_refused_without_showing_a_value(case: str) -> None:
    update, clipping_norm = REJECTED[case]
    with pytest.raises(InvalidInput) as caught:
        clip(update, clipping_norm)
    assert "123456" not in str(caught.value) + caught.value.private + str(caught.value.metadata)
