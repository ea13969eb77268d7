"""Texts that say which models are kept, and which round is meant: one grammar each, and nothing outside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from src.errors import InvalidInput
from src.jobs.computations import EvaluationSpec, ExportSpec
from src.jobs.keeping import LARGER_IS_BETTER, SMALLER_IS_BETTER, Keep, Metric, check_choice
from src.jobs.spec import FederatedTrainingSpec


@dataclass(frozen=True)
class Round:
    number: int
    metrics: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize("text", ["1", "5", "999999999", "last", "best:auc", "best:loss", "best:max:x", "best:min:x.y"])
def test_a_round_is_meant_by_its_number_or_as_the_last_or_the_best(text: str) -> None:
    assert check_choice(text) == text
    assert ExportSpec.from_json({"job_id": "j", "round": text}).round == text
    assert EvaluationSpec.from_json({"job_id": "j", "round": text}).round == text


@pytest.mark.parametrize(
    "text",
    [
        *("0", "-1", "01", "+1", "1.0", "1e3", " 1", "1\n", "9" * 10, "9" * 400, "1;2", "Last", "all", "first"),
        *("best", "best:", "best:max:", "best:up:auc", "best:a b", "best:../x", "best:" + "a" * 65),
        *("best:epsilon_party", "best:n", "best:max:n", "best:min:n"),
    ],
)
def test_whatever_else_is_said_is_refused_before_anything_is_looked_up(text: str) -> None:
    """Among it numbers that no database holds, and figures of which nobody says which end is the good one."""
    with pytest.raises(InvalidInput, match="round"):
        check_choice(text)
    with pytest.raises(InvalidInput, match=r"export\.round: (must be the number of a round|say whether|n is)"):
        ExportSpec.from_json({"job_id": "j", "round": text})


def test_a_job_file_says_a_number() -> None:
    assert ExportSpec.from_json({"job_id": "j", "round": 5}).round == "5"
    with pytest.raises(InvalidInput):
        ExportSpec.from_json({"job_id": "j", "round": True})


def test_a_round_is_of_a_job_and_not_of_a_model_that_was_brought() -> None:
    with pytest.raises(InvalidInput, match="give job_id"):
        EvaluationSpec.from_json({"model_sha256": "a" * 64, "task": "t", "round": "1"})


def test_the_best_is_the_first_of_the_best_by_a_metric_whose_good_end_is_known() -> None:
    rounds = [
        Round(1, {"auc": 0.5, "loss": 3.0}),
        Round(2, {"auc": float("nan"), "loss": 1.0}),
        Round(3, {"auc": 0.7}),
        Round(4, {"auc": 0.7, "loss": 1.0}),
        Round(5),
    ]
    found = {
        text: Metric.from_text(text).best(rounds) for text in ("auc", "loss", "min:auc", "max:loss", "max:f", "f1")
    }
    assert {text: each and each.number for text, each in found.items()} == {
        "auc": 3,
        "loss": 2,
        "min:auc": 1,
        "max:loss": 1,
        "max:f": None,
        "f1": None,
    }
    assert not LARGER_IS_BETTER & SMALLER_IS_BETTER


@pytest.mark.parametrize(
    ("text", "most"), [("last", 1), ("", 1), ("every:1", 11), ("every:3", 4), ("every:99", 1), ("best:auc", 2)]
)
def test_what_is_kept_is_said_in_the_specification_and_bounded(text: str, most: int) -> None:
    spec = FederatedTrainingSpec.from_json({"task": "t", "keep": text})
    assert Keep.from_text(spec.keep).most(10) == most
    assert FederatedTrainingSpec.from_json(spec.to_json()) == spec
    assert ("keep" in spec.to_json()) == (text not in ("", "last"))  # the digest of a job of before is what it was


@pytest.mark.parametrize(
    "text",
    ["all", "best", "every 5", "every", "every:0", "every:-1", "every:1.5", "every:9999999", "best:n", "best:max:n"],
)
def test_nothing_else_can_be_kept(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"federated_training\.keep: (must be 'last', 'every:'|say whether|n is)"):
        FederatedTrainingSpec.from_json({"task": "t", "keep": text})


def test_a_job_that_goes_on_starts_from_the_model_of_that_round_and_no_other() -> None:
    source: dict[str, Any] = {"job_id": "j", "round": 3, "model_sha256": "a" * 64}
    spec = FederatedTrainingSpec.from_json({"task": "t", "continue_from": source})
    assert spec.initial_model_sha256 == "a" * 64
    assert spec.source_job_id == "j"
    assert FederatedTrainingSpec.from_json(spec.to_json()) == spec
    plain = FederatedTrainingSpec.from_json({"task": "t", "initial_model_sha256": "a" * 64})
    assert spec.digest != plain.digest
    wrongs: tuple[dict[str, Any], ...] = (
        {"initial_model_sha256": "b" * 64, "continue_from": source},
        *(
            {"continue_from": {**source, name: value}}
            for name, value in (("round", 0), ("round", -3), ("round", 2**40))
        ),
        *({"continue_from": {**source, "model_sha256": value}} for value in ("", "a", "A" * 64)),
        {"continue_from": {"job_id": "j", "round": 3}},
        {"continue_from": {**source, "job_id": "../j"}},
    )
    for wrong in wrongs:
        with pytest.raises(InvalidInput):
            FederatedTrainingSpec.from_json({"task": "t", **wrong})
