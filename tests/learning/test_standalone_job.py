"""The job of `sotto train`: what is left out has its documented default, what is wrong is refused by its path."""

from __future__ import annotations

import json
from typing import Any

import pytest

from src.errors import InvalidInput, LimitError
from src.learning.standalone_job import MAX_JOB_BYTES, TrainJob, parse_job


def parsed(**fields: Any) -> TrainJob:
    return parse_job(json.dumps({"job_id": "j", "dp": {"epsilon": 1.0}, **fields}).encode())


def test_a_job_needs_a_name_and_a_price_and_no_more() -> None:
    assert parse_job(b'{"job_id": "test_123", "dp": {"epsilon": 1}}') == TrainJob(
        job_id="test_123",
        dataset="synthetic",
        task=None,
        private=True,
        epsilon=1.0,
        noise_multiplier=None,
        delta=1e-5,
        clip=1.0,
        epochs=5,
        batch_size=None,
        learning_rate=1.0,
        seed=0,
    )


def test_every_field_is_taken_over() -> None:
    dp = {"enabled": True, "epsilon": 2, "delta": 1e-6, "clip": 0.5, "noise_multiplier": 3}
    job = parsed(dataset="randhie", task="randhie", dp=dp, epochs=2, batch_size=64.0, learning_rate=1, seed=2**53 - 1)
    assert (job.dataset, job.task, job.epochs, job.batch_size, job.seed) == ("randhie", "randhie", 2, 64, 2**53 - 1)
    assert (job.epsilon, job.delta, job.clip, job.noise_multiplier) == (2.0, 1e-6, 0.5, 3.0)
    assert [type(each) for each in (job.batch_size, job.epsilon, job.learning_rate)] == [int, float, float]


def test_without_privacy_no_epsilon_is_needed() -> None:
    job = parsed(dp={"enabled": False})
    assert (job.private, job.epsilon, job.noise_multiplier) == (False, None, None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"job_id": ""}, "job_id"),
    ({"job_id": 7}, "job_id"),
    ({"job_id": "../x"}, "job_id"),
    ({"job_id": "x\n"}, "job_id"),
    ({"job_id": "x" * 129}, "job_id"),
    ({"dataset": None}, "dataset"),
    ({"dataset": "a/b"}, "dataset"),
    ({"task": ""}, "task"),
    ({"dp": True}, "dp"),
    ({"dp": {}}, "dp"),
    ({"dp": {"enabled": True}}, "dp"),
    ({"dp": {"enabled": "false", "epsilon": 1.0}}, "dp.enabled"),
    ({"dp": {"epsilon": 0}}, "dp.epsilon"),
    ({"dp": {"epsilon": -1.0}}, "dp.epsilon"),
    ({"dp": {"epsilon": "1.0"}}, "dp.epsilon"),
    ({"dp": {"epsilon": True}}, "dp.epsilon"),
    ({"dp": {"epsilon": None}}, "dp.epsilon"),
    ({"dp": {"epsilon": 1.0, "delta": 0}}, "dp.delta"),
    ({"dp": {"epsilon": 1.0, "delta": 1}}, "dp.delta"),
    ({"dp": {"epsilon": 1.0, "clip": 0}}, "dp.clip"),
    ({"dp": {"noise_multiplier": 0}}, "dp.noise_multiplier"),
    ({"dp": {"enabled": False, "epsilon": 1.0}}, "dp.epsilon"),
    ({"dp": {"enabled": False, "noise_multiplier": 1.0}}, "dp.noise_multiplier"),
    ({"dp": {"epsilon": 1.0, "sigma": 1.0}}, "dp.sigma"),
    ({"epochs": 0}, "epochs"),
    ({"epochs": 1.5}, "epochs"),
    ({"batch_size": 0}, "batch_size"),
    ({"learning_rate": 0}, "learning_rate"),
    ({"learning_rate": "fast"}, "learning_rate"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**53}, "seed"),
    ({"user": "user_456"}, "user"),
    ({"mock": True}, "mock"),
]


@pytest.mark.parametrize(("fields", "path"), REFUSED, ids=[json.dumps(fields)[:60] for fields, _ in REFUSED])
def test_a_field_out_of_its_range_is_refused_by_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parsed(**fields)
    assert list(refused.value.violations) == [path]


def test_a_job_larger_than_any_job_is_refused_unread() -> None:
    with pytest.raises(LimitError):
        parse_job(b" " * (MAX_JOB_BYTES + 1))
