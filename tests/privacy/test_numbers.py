"""Numbers of any type cost what the float costs: on every way into the accountant, and none of its traps is reached."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from src.errors import InvalidInput
from src.learning.standalone import find_source, plan_run
from src.learning.standalone_job import parse_job
from src.privacy import accounting
from src.privacy.accounting import (
    calibrate_dp_sgd,
    calibrate_sampled_sum,
    epsilon,
    epsilon_estimates,
    to_dp_event,
)
from src.privacy.entries import Limit
from src.privacy.events import DpSgdSteps, Event, NoisySum, SampledNoisySum, Shares, event_from_json, event_to_json
from src.privacy.figures import figures
from src.privacy.noise_plan import plan_noise

REALS: dict[str, Callable[[float], Any]] = {
    "int": int,
    "Fraction": Fraction,
    "Decimal": Decimal,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "int8": np.int8,
    "int32": np.int32,
    "uint64": np.uint64,
}
COUNTS: dict[str, Callable[[int], Any]] = {"int32": np.int32, "int64": np.int64, "uint16": np.uint16}
EVERY_REAL = pytest.mark.parametrize("kind", REALS.values(), ids=REALS)
EVERY_COUNT = pytest.mark.parametrize("kind", COUNTS.values(), ids=COUNTS)


def events(z: Any = 2.0, q: Any = 0.25, n: Any = 300, one: Any = 1.0) -> list[Event]:
    """One of every kind that has numbers, sampled and not."""
    shares = Shares(noise_by="both", quorum=3, colluders=1, share_multiplier=one, shares_tau=0.0)
    return [
        DpSgdSteps(sampling_rate=q, noise_multiplier=z, steps=n),
        DpSgdSteps(sampling_rate=one, noise_multiplier=z, steps=n),
        SampledNoisySum(sampling_rate=q, noise_multiplier=z, rounds=n, shares=shares),
        SampledNoisySum(sampling_rate=one, noise_multiplier=z, rounds=n),
        NoisySum(noise_multiplier=z, rounds=n, shares=shares),
    ]


AS_FLOATS = events()


def costs(given: list[Event], delta: Any = 2.0**-17) -> list[float]:
    return [epsilon([event], delta=delta) for event in given]


@EVERY_REAL
def test_a_noise_multiplier_of_any_type_costs_what_the_float_costs(kind: Callable[[float], Any]) -> None:
    """A whole number or a float32 that reached dp-accounting would lose its composition: ε 1.2 for 28."""
    found = events(kind(2), one=kind(1))
    assert found == AS_FLOATS
    assert all(type(getattr(event, "noise_multiplier")) is float for event in found)  # noqa: B009
    assert costs(found) == costs(AS_FLOATS)
    assert [to_dp_event(event) for event in found] == [to_dp_event(event) for event in AS_FLOATS]
    assert [event_to_json(event) for event in found] == [event_to_json(event) for event in AS_FLOATS]


@pytest.mark.parametrize("kind", [Fraction, Decimal, np.float16, np.float32, np.float64, np.longdouble])
def test_a_sampling_rate_and_a_delta_of_any_type_too(kind: Callable[[float], Any]) -> None:
    assert costs(events(q=kind(0.25)), delta=kind(2.0**-17)) == costs(AS_FLOATS)


@EVERY_COUNT
def test_a_count_of_any_type_is_counted_out(kind: Callable[[int], Any]) -> None:
    """Numpy's own would overflow silently once they are multiplied."""
    found = events(n=kind(300))
    assert found == AS_FLOATS
    assert costs(found) == costs(AS_FLOATS)
    many = DpSgdSteps(sampling_rate=0.25, noise_multiplier=2.0, steps=kind(30_000)).repeated(kind(30_000))
    assert (many.steps, type(many.steps)) == (900_000_000, int)


@EVERY_REAL
def test_what_stands_in_an_event_whatever_put_it_there_reaches_dp_accounting_as_a_float(
    kind: Callable[[float], Any],
) -> None:
    """Events convert where they are made; where dp-accounting's are made it is done again."""
    for event in events():
        object.__setattr__(event, "noise_multiplier", kind(2))
        gaussians = [each for each in _parts(to_dp_event(event)) if hasattr(each, "noise_multiplier")]
        assert all(type(each.noise_multiplier) is float for each in gaussians)
    broken = DpSgdSteps(sampling_rate=0.25, noise_multiplier=2.0, steps=300)
    object.__setattr__(broken, "noise_multiplier", kind(2))
    accounting._renyi_of_one.cache_clear()
    assert epsilon([broken], delta=2.0**-17) == costs(AS_FLOATS)[0]


def _parts(event: Any) -> list[Any]:
    inner = [*getattr(event, "events", ()), *([event.event] if hasattr(event, "event") else [])]
    return [event, *(part for each in inner for part in _parts(each))]


@EVERY_REAL
def test_other_accountants_and_figures_are_of_the_float(kind: Callable[[float], Any]) -> None:
    given = [DpSgdSteps(sampling_rate=1.0, noise_multiplier=kind(9), steps=4)]
    plain = [DpSgdSteps(sampling_rate=1.0, noise_multiplier=9.0, steps=4)]
    assert epsilon_estimates(given, delta=1e-5) == epsilon_estimates(plain, delta=1e-5)
    sums = [NoisySum(noise_multiplier=kind(9), rounds=4)]
    assert figures(sums, unit="party", delta=1e-5) == figures(
        [NoisySum(noise_multiplier=9.0, rounds=4)], unit="party", delta=1e-5
    )
    assert plan_noise(
        noise_by="both", noise_multiplier=kind(9), sensitivity=kind(100), quorum=3, colluders=0
    ) == plan_noise(noise_by="both", noise_multiplier=9.0, sensitivity=100.0, quorum=3, colluders=0)


@pytest.mark.parametrize("kind", [int, Fraction, Decimal, np.float32, np.int64])
def test_calibrations_take_any_type_for_the_float(kind: Callable[[float], Any]) -> None:
    assert calibrate_dp_sgd(epsilon=kind(2), delta=1e-5, sampling_rate=kind(1), steps=30) == calibrate_dp_sgd(
        epsilon=2.0, delta=1e-5, sampling_rate=1.0, steps=30
    )
    found = calibrate_sampled_sum(
        epsilon=kind(2), delta=1e-5, sampling_rate=kind(1), rounds=30, dimension=4, tau_of=None, failure_probability=0
    )
    assert found == calibrate_sampled_sum(
        epsilon=2.0, delta=1e-5, sampling_rate=1.0, rounds=30, dimension=4, tau_of=None
    )


def test_a_job_file_with_a_whole_number_costs_what_one_with_a_point_costs() -> None:
    priced = []
    for text in ("2", "2.0"):
        job = parse_job(b'{"job_id": "j", "dp": {"noise_multiplier": %s}, "epochs": 30}' % text.encode())
        made = plan_run(job, find_source(job, {}), allow_without_dp=False)
        assert isinstance(made.event, DpSgdSteps)
        assert type(made.event.noise_multiplier) is float
        priced.append(made.epsilon)
    assert priced[0] == priced[1] > 0.1


def test_what_is_stored_has_one_form_and_others_are_refused() -> None:
    """In a ledger a real is a text; a number in its place, or a whole one, is no event."""
    fields = event_to_json(AS_FLOATS[0])
    for wrong in (2, 2.0, "2", "2.00", "nan", "-1.0", "inf", True, None):
        with pytest.raises(InvalidInput):
            event_from_json({**json.loads(json.dumps(fields)), "noise_multiplier": wrong})


NO_NUMBERS = [
    math.nan,
    math.inf,
    -1.0,
    -1,
    np.float32("nan"),
    np.float64(-0.5),
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal(-1),
    Fraction(-1, 3),
    10**400,
    Fraction(10**400),
    True,
    np.bool_(True),
    "1.0",
    b"1.0",
    None,
    1 + 0j,
    np.array(1.0),
    [1.0],
]


@pytest.mark.parametrize("wrong", NO_NUMBERS, ids=lambda value: f"{type(value).__name__}")
def test_what_is_no_number_or_not_finite_or_negative_is_no_noise(wrong: Any) -> None:
    """Of a divergence that is not a number dp-accounting makes ε = 0."""
    makers: list[Callable[[], object]] = [
        lambda: DpSgdSteps(sampling_rate=0.25, noise_multiplier=wrong, steps=1),
        lambda: NoisySum(noise_multiplier=wrong),
        lambda: SampledNoisySum(sampling_rate=0.25, noise_multiplier=wrong),
        lambda: NoisySum(noise_multiplier=1.0, tau=wrong),
        lambda: NoisySum(noise_multiplier=1.0, failure_probability=wrong),
        lambda: DpSgdSteps(sampling_rate=wrong, noise_multiplier=1.0, steps=1),
        lambda: Shares(noise_by="both", quorum=2, colluders=0, share_multiplier=wrong, shares_tau=0.0),
        lambda: calibrate_dp_sgd(epsilon=wrong, delta=1e-5, sampling_rate=0.25, steps=1),
        lambda: epsilon(AS_FLOATS[:1], delta=wrong),
    ]
    for make in makers:
        with pytest.raises(InvalidInput):
            make()


@pytest.mark.parametrize("wrong", [0, -1, 2**53 + 1, 1.0, np.float64(3), True, "3", None, Fraction(3), math.nan])
def test_what_is_no_count_counts_for_nothing(wrong: Any) -> None:
    makers: list[Callable[[], object]] = [
        lambda: DpSgdSteps(sampling_rate=0.25, noise_multiplier=1.0, steps=wrong),
        lambda: NoisySum(noise_multiplier=1.0, rounds=wrong),
        lambda: NoisySum(noise_multiplier=1.0, dimension=wrong),
        lambda: AS_FLOATS[0].repeated(wrong),
    ]
    for make in makers:
        with pytest.raises(InvalidInput):
            make()


@pytest.mark.parametrize("wrong", [math.nan, 1.5, True, "3", -1])
def test_a_limit_in_rounds_is_a_whole_number(wrong: Any) -> None:
    """No sum exceeds a limit that is not a number."""
    with pytest.raises(InvalidInput, match="max_rounds"):
        Limit(max_rounds=wrong, epsilon=None, delta=1e-5)


@pytest.mark.parametrize("value", [math.nan, -1.0, -1e-18])
def test_a_divergence_that_is_no_bound_makes_epsilon_infinite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever went wrong in computing it: nothing is added to it, taken from it, or made of it."""
    accounting._renyi_of_one.cache_clear()
    monkeypatch.setattr(accounting, "_renyi", lambda *_, orders: np.full(len(orders), value))
    monkeypatch.setattr("src.privacy.renyi.sampled_gaussian", lambda *_: np.full(len(_[2]), value))
    assert epsilon(AS_FLOATS[:1], delta=1e-5) == math.inf
    assert epsilon([AS_FLOATS[0], cast("DpSgdSteps", AS_FLOATS[1])], delta=1e-5) == math.inf
    accounting._renyi_of_one.cache_clear()


SRC = Path(__file__).resolve().parents[2] / "src"
MADE = {
    "NonPrivateDpEvent",
    "SelfComposedDpEvent",
    "ComposedDpEvent",
    "ZCDpEvent",
    "PoissonSampledDpEvent",
    "GaussianDpEvent",
}


def test_dp_accounting_is_given_no_event_whose_count_it_forgets() -> None:
    """Randomized response is charged once however often it ran, and a composition under sampling by its first part
    alone: neither is made. One function makes Gaussians, and converts."""
    found: list[tuple[str, str]] = []
    for path in SRC.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                names = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                found += [(function.name, name) for name in names if name.endswith("DpEvent")]
    assert {name for _, name in found} == MADE
    assert [function for function, name in found if name == "GaussianDpEvent"] == ["_gaussian"]
    sampled = [
        part for event in AS_FLOATS for part in _parts(to_dp_event(event)) if hasattr(part, "sampling_probability")
    ]
    assert {type(part.event).__name__ for part in sampled} == {"GaussianDpEvent"}
