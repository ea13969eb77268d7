"""The vectors of plans of `fedsgd`, of one with adaptive clipping, and of one that names the order which it rests on;
their rounds have the bytes of any other round. See `generate.py`."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any, Final

from src.encryption.scheme import Scheme
from src.privacy.clipping import AdaptiveClipping
from src.protocol.canonical import real
from src.protocol.derive import derive, derive_gradient_sum, example_multiplier
from src.protocol.order import ORDER_KIND, Order, sign_order
from src.protocol.plan import PLAN_KIND, GradientSum, LocalPlan, NormAdaptation, RoundPlan, signed_digest
from src.protocol.roster import AGGREGATOR
from src.protocol.signing import SigningKey

Json = dict[str, Any]

SEED: Final = b"fedsgd plans".ljust(32, b"-")
ORDER_SEED: Final = b"an order".ljust(32, b"-")
DECLARED: Final = {"a": 300, "b": 40, "c": 257, "\u00f6": 1}
"""The cap is below the largest; the smallest is one row."""


def plan_vectors(scheme: Scheme) -> dict[str, Json]:
    """By name: of fedsgd, noise by both sides with a colluder, and by an aggregator that is trusted; and adaptive
    clipping of twenty-two parties."""
    both = _plan(scheme, noise_by="both", quorum=3, colluders=1, noise_multiplier=1.3)
    trusted = _plan(scheme, noise_by="aggregator", quorum=2, colluders=0, noise_multiplier=0.9)
    plans = {"plan_fedsgd": both, "plan_fedsgd_trusted": trusted, "plan_adaptive": _adaptive(scheme)}
    return {name: _vector(name, plan) for name, plan in plans.items()}


def order_vector(scheme: Scheme) -> Json:
    """A scientist's order, with text beyond ASCII in it, and a plan that rests on it."""
    anns = SigningKey.from_bytes(ORDER_SEED)
    order = Order(
        federation="vectors",
        scientist="ann",
        request_id="request \u00e9",
        expires_at="2026-12-31T23:59:59Z",
        job="federated_training",
        spec='{"task": "randhie", "rounds": "20", "spare_rounds": "5", "task_options": {"\u03b5": 1}}',
        model_sha256=hashlib.sha256(b"model").hexdigest(),
        most_rounds=25,
    )
    signed = sign_order(order, anns)
    plan = _plan(scheme, noise_by="parties", quorum=3, colluders=1, noise_multiplier=1.3)
    vector = _vector("order", replace(plan, order=signed_digest(signed, ORDER_KIND)))
    vector["signing_keys"] |= {"ann": {"seed": ORDER_SEED.hex(), "verify_key": anns.verify_key.hex()}}
    return {
        **vector,
        "format": "sotto-order-vector/1",
        "order": signed.to_json(),
        "order_digest": signed_digest(signed, ORDER_KIND),
    }


def _vector(name: str, plan: RoundPlan) -> Json:
    key = SigningKey.from_bytes(SEED)
    signed = key.sign(PLAN_KIND, plan.to_statement(), signer=AGGREGATOR)
    return {
        "format": "sotto-plan-vector/1",
        "name": name,
        "signing_keys": {AGGREGATOR: {"seed": SEED.hex(), "verify_key": key.verify_key.hex()}},
        "plan": signed.to_json(),
        "plan_digest": signed_digest(signed, PLAN_KIND),
    }


def _adaptive(scheme: Scheme) -> RoundPlan:
    rule = AdaptiveClipping(quantile=0.6, learning_rate=0.2, bit_deviation=1.05, smallest=0.001, largest=1000.0)
    cohort = tuple(f"p{index:02}" for index in range(22))
    derived = derive(
        scheme,
        dimension=123,
        clipping_norm=0.75,
        resolution_bits=15,
        noise_by="both",
        noise_multiplier=0.8,
        delta=1e-6,
        cohort=len(cohort),
        quorum=21,
        colluders=1,
        priced_rounds=25,
        adaptive=rule,
    )
    return replace(
        _plan(scheme, noise_by="both", quorum=3, colluders=1, noise_multiplier=1.3),
        local=LocalPlan(10, real(0.05), real(0.1), real(1.0), real(1.1), real(1e-5)),
        clipping_norm=real(derived.contribution_norm),
        resolution_bits=derived.resolution_bits,
        rounded_bound=derived.rounded_bound,
        layout=derived.layout.to_json(),
        noise=derived.noise,
        cohort=cohort,
        quorum=21,
        gradient_sum=None,
        adaptive_clipping=NormAdaptation(
            **{field.name: real(getattr(rule, field.name)) for field in fields(rule)}, bit_unit=derived.bit_unit
        ),
    )


def _plan(scheme: Scheme, *, noise_by: str, quorum: int, colluders: int, noise_multiplier: float) -> RoundPlan:
    local: Json = {"max_grad_norm": 0.7, "sampling_rate": 0.15}
    trusted = noise_by == "aggregator"
    derived = derive_gradient_sum(
        scheme,
        **local,
        dimension=123,
        resolution_bits=14,
        noise_by=noise_by,
        noise_multiplier=noise_multiplier,
        delta=1e-5,
        declared_rows=DECLARED,
        trusted_aggregator=trusted,
        quorum=quorum,
        colluders=colluders,
        priced_rounds=25,
    )
    return RoundPlan(
        federation="vectors",
        job_id="job-4",
        round=7,
        priced_rounds=25,
        spec_digest=hashlib.sha256(b"specification").hexdigest(),
        task="randhie",
        task_options="{}",
        seed=7,
        model_sha256=hashlib.sha256(b"model").hexdigest(),
        model_bytes=1234,
        dimension=123,
        local=LocalPlan(
            steps=1,
            sampling_rate=real(local["sampling_rate"]),
            learning_rate=real(1.5),
            max_grad_norm=real(local["max_grad_norm"]),
            noise_multiplier=real(example_multiplier(derived.noise_plan)),
            delta=real(1e-5),
        ),
        clipping_norm=real(derived.contribution_norm),
        resolution_bits=derived.resolution_bits,
        rounded_bound=derived.rounded_bound,
        scheme=scheme.name,
        key_id=derived.layout.key_id,
        layout=derived.layout.to_json(),
        noise=derived.noise,
        roster_digest=hashlib.sha256(b"roster").hexdigest(),
        cohort=tuple(DECLARED),
        quorum=quorum,
        colluders=colluders,
        threshold=2,
        custody="threshold",
        gradient_sum=GradientSum(batch_cap=derived.cap, declared_rows=DECLARED, trusted_aggregator=trusted),
    )
