"""What a model's predictions are worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from src.learning.evaluation import area_under_roc, default_metrics

SCORES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5000001, 3.0]) | st.floats(-10, 10, width=32)


@given(st.lists(st.tuples(SCORES, st.integers(0, 1)), min_size=2, max_size=60))
def test_the_area_under_the_curve_is_that_of_scikit_learn(rows: list[tuple[float, int]]) -> None:
    """Ties included; for labels 0 and 1, and -1 and 1."""
    scores, labels = np.array([row[0] for row in rows], dtype=np.float32), np.array([row[1] for row in rows])
    if np.unique(labels).size == 2:
        assert area_under_roc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert area_under_roc(scores, 2 * labels - 1) == area_under_roc(scores, labels)
        assert area_under_roc(-scores, labels) == pytest.approx(1 - area_under_roc(scores, labels))


def test_where_it_is_not_defined_there_is_none() -> None:
    ones = np.ones(3, dtype=np.int64)
    assert default_metrics(np.array([0.1, 0.2, -1.0]), ones) == {"accuracy": pytest.approx(2 / 3)}
    found = default_metrics(np.array([np.nan, 0.2, -1.0]), np.array([0, 1, 0]))
    assert set(found) == {"accuracy"}
