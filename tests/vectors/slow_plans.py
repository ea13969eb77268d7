"""A round plan's figures by their formulas (docs/protocol.md, "The round plan"): whole numbers and fractions.

Part of the slow verifier (`verify_slow.py`), which shares no code with the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from decimal import Context, Decimal
from fractions import Fraction
from math import ceil, floor, inf, isqrt, nextafter, sqrt
from typing import Final

from .slow_forms import Json, digest_of, fields, names_in, opened, rational, real, require, unhex, verify_key_of

PLAN_FIELDS: Final = names_in(
    "federation job_id round priced_rounds spec_digest task task_options seed model_sha256 model_bytes dimension local "
    "clipping_norm resolution_bits rounded_bound scheme key_id layout noise roster_digest cohort quorum colluders "
    "threshold custody"
)


def derived(plan: Json) -> Json:
    """What follows from the settings of a plan of fedavg (docs/protocol.md, "The round plan")."""
    exact, d = Context(prec=100), plan["dimension"]
    c = Fraction(real(plan["clipping_norm"])) * 2 ** plan["resolution_bits"]
    length, root = exact.divide(Decimal(c.numerator), Decimal(c.denominator)), exact.sqrt(Decimal(d))
    whole = exact.power(exact.add(length, root), 2)
    likely = sum((length * length, Decimal(d) / 4, length, root / 2), Decimal(0))
    bound = ceil(exact.sqrt(min(whole, likely)))
    if "adaptive_clipping" not in plan:
        return _derived(plan, bound=bound, coordinate=ceil(c))
    unit = bit_unit(plan, bound)
    joint = _derived(
        {**plan, "dimension": d + 1},
        bound=next(k for k in range(bound, bound + unit + 1) if k * k >= bound**2 + unit**2),
        coordinate=max(ceil(c), unit),
    )
    return {**joint, "rounded_bound": bound, "bit_unit": unit}


def bit_unit(plan: Json, bound: int) -> int:
    """What a bit is worth: z_Δ·R / (2σ_b), rounded down, for z_Δ² = 1 / (1/z² − 1/(2σ_b)²); at least 1, 1 for z = 0."""
    z, twice = real(plan["noise"]["noise_multiplier"]), 2 * Fraction(real(plan["adaptive_clipping"]["bit_deviation"]))
    if not z:
        return 1
    left = 1 / Fraction(z) ** 2 - 1 / twice**2
    require(left > 0, "twice the deviation of the bits exceeds the noise multiplier")
    return max(1, isqrt(floor(bound**2 / left / twice**2)))


def derived_of_sum(plan: Json) -> Json:
    """The same for fedsgd, and what only such a plan has."""
    local, declared = plan["local"], plan["gradient_sum"]["declared_rows"]
    scale, norm, root = (
        2 ** plan["resolution_bits"],
        Fraction(real(local["max_grad_norm"])),
        least_root(plan["dimension"]),
    )
    require((norm * scale) ** 2 >= 100**2 * plan["dimension"], "rounding is at most a hundredth of the norm")
    draws = len(plan["cohort"]) * plan["priced_rounds"]
    cap = batch_cap(max(declared.values()), Fraction(real(local["sampling_rate"])), draws=draws)
    clipping_norm = cap * real(local["max_grad_norm"])
    multiplier = real(plan["noise"]["noise_multiplier"])
    if plan["noise"]["noise_by"] == "both":
        half = Fraction(multiplier) ** 2 / 2
        near = sqrt(half)
        multiplier = max(x for x in (nextafter(near, 0.0), near, nextafter(near, inf)) if Fraction(x) ** 2 <= half)
    bounds = {"bound": ceil(norm * scale) + root, "coordinate": ceil(Fraction(clipping_norm) * scale)}
    return {
        **_derived(plan, **bounds),
        "batch_cap": cap,
        "clipping_norm": repr(clipping_norm),
        "local.noise_multiplier": repr(multiplier),
        "local.steps": 1,
    }


def least_root(number: int) -> int:
    """⌈√number⌉."""
    return next(k for k in range(number + 1) if k * k >= number)


def batch_cap(rows: int, rate: Fraction, *, draws: int) -> int:
    """The smallest K above which the bound e^(−n·KL(k/n ‖ q)) is at most 2^−(64 + ⌈log₂ draws⌉), in whole numbers.

    With k = K + 1 that is q^k·(1 − q)^(n − k)·n^n·2^m ≤ k^k·(n − k)^(n − k), times the denominator of q to the n.
    """
    bits = 64 + least_bits(draws)
    part, whole = rate.numerator, rate.denominator
    for k in range(1, rows + 1):
        rare = part**k * (whole - part) ** (rows - k) * rows**rows << bits
        if k > rate * rows and rare <= k**k * (rows - k) ** (rows - k) * whole**rows:
            return k - 1
    return rows


def least_bits(number: int) -> int:
    """⌈log₂ number⌉."""
    return next(k for k in range(200) if 1 << k >= number)


def _derived(plan: Json, *, bound: int, coordinate: int) -> Json:
    """Noise and slots for a sensitivity and the largest coordinate, both in units."""
    d, cohort = plan["dimension"], len(plan["cohort"])
    total = (Fraction(real(plan["noise"]["noise_multiplier"])) * bound) ** 2
    by_parties = {"both": Fraction(1, 2), "parties": Fraction(1), "aggregator": Fraction(0)}[plan["noise"]["noise_by"]]

    def on_grid(value: Fraction) -> Fraction:
        return Fraction(ceil(value * 2**20), 2**20)

    aggregator = on_grid(total * (1 - by_parties))
    share = on_grid(total * by_parties / (plan["quorum"] - plan["colluders"]))
    largest, draws = max(aggregator, share), d * (cohort + 1) * plan["priced_rounds"]
    ln2 = Fraction(6931471806, 10**10)
    tail = isqrt(ceil(2 * largest * ln2 * (65 + least_bits(draws)))) + 1 if largest else 0
    offset, contributions = coordinate + tail, cohort + (aggregator > 0)
    slot_bits = (contributions * 2 * offset).bit_length()
    slots = (plan["layout"]["modulus_bits"] - 1) // slot_bits
    return {
        "rounded_bound": bound,
        "share_sigma2": share,
        "aggregator_sigma2": aggregator,
        "bound": tail,
        "offset": offset,
        "contributions": contributions,
        "slot_bits": slot_bits,
        "slots_per_ciphertext": slots,
        "ciphertext_count": -(-d // slots),
        "ciphertext_bytes": plan["layout"]["modulus_bits"] // 4,
        "parameter_count": d,
        "scheme": plan["scheme"],
        "key_id": plan["key_id"],
        "version": 1,
    }


def check_figures(plan: Json, expected: Json) -> None:
    """Every figure that follows from others, and the form of those that do not."""
    noise = plan["noise"]
    fields(noise, "noise_by", "noise_multiplier", "share_sigma2", "aggregator_sigma2", "bound", "delta")
    found = {**plan["layout"], "rounded_bound": plan["rounded_bound"], "bound": noise["bound"]}
    found |= {name: rational(noise[name]) for name in ("share_sigma2", "aggregator_sigma2")}
    if "adaptive_clipping" in plan:
        found["bit_unit"] = plan["adaptive_clipping"]["bit_unit"]
    if "gradient_sum" in plan:
        found |= {"batch_cap": plan["gradient_sum"]["batch_cap"], "clipping_norm": plan["clipping_norm"]}
        found |= {f"local.{name}": plan["local"][name] for name in ("steps", "noise_multiplier")}
    for name, value in expected.items():
        require(found.pop(name) == value, f"the plan's {name} follows from its settings")
    require(set(found) == {"modulus_bits"}, "the layout has no other field")
    fields(plan["local"], "steps", "sampling_rate", "learning_rate", "max_grad_norm", "noise_multiplier", "delta")
    for text in [value for name, value in plan["local"].items() if name != "steps"] + [noise["delta"]]:
        real(text)


def verify_plan(vector: Json) -> Iterator[str]:
    """Every check of a plan that stands by itself, of fedsgd or with adaptive clipping; yields what held."""
    fields(vector, "format", "name", "signing_keys", "plan", "plan_digest")
    fields(vector["signing_keys"], "aggregator")
    keys = vector["signing_keys"]["aggregator"]
    require(verify_key_of(unhex(keys["seed"])).hex() == keys["verify_key"], "a verification key is its seed's")
    plan = opened(vector, vector["plan"], "plan", signer="aggregator")
    require(digest_of(vector["plan"], "plan") == vector["plan_digest"], "the digest of the plan")
    yield "plan: the digest, the signature"
    if vector["name"] == "plan_adaptive":
        verify_adaptive(plan)
    else:
        verify_sum(plan, name=vector["name"])
    yield "figures: what follows from the settings"


ORDER_FIELDS: Final = names_in("version federation scientist request_id expires_at job spec model_sha256 most_rounds")


def verify_order(vector: Json) -> Iterator[str]:
    """A scientist's order, and a plan of fedsgd that names it."""
    fields(vector, "format", "name", "signing_keys", "plan", "plan_digest", "order", "order_digest")
    require(vector["name"] == "order", "the name says what it is")
    fields(vector["signing_keys"], "aggregator", "ann")
    for keys in vector["signing_keys"].values():
        require(verify_key_of(unhex(keys["seed"])).hex() == keys["verify_key"], "a verification key is its seed's")
    order = opened(vector, vector["order"], "order", signer="ann")
    require(digest_of(vector["order"], "order") == vector["order_digest"], "the digest of the order")
    fields(order, *ORDER_FIELDS)
    require((order["version"], order["scientist"]) == (1, "ann"), "an order of version 1, of who signs it")
    datetime.strptime(order["expires_at"], "%Y-%m-%dT%H:%M:%S%z")  # raises where it is no time
    require(order["expires_at"].endswith("Z"), "the time is UTC")
    require(len(unhex(order["model_sha256"])) == 32, "a digest of the model")
    asked = json.loads(order["spec"])
    require(int(asked["rounds"]) + int(asked["spare_rounds"]) == order["most_rounds"], "all rounds are ordered")
    yield "order: the fields, the digest, the signature"
    plan = opened(vector, vector["plan"], "plan", signer="aggregator")
    require(digest_of(vector["plan"], "plan") == vector["plan_digest"], "the digest of the plan")
    fields(plan, *PLAN_FIELDS, "strategy", "gradient_sum", "order")
    require(plan["order"] == vector["order_digest"], "the plan names the order")
    same = ("federation", "federation"), ("priced_rounds", "most_rounds")
    require(all(plan[mine] == order[its] for mine, its in same), "federation and rounds are those that were ordered")
    check_figures(plan, derived_of_sum(plan))
    yield "plan: the order that it names, the digest, the signature, the figures"


def verify_adaptive(plan: Json) -> None:
    """A plan with adaptive clipping."""
    fields(plan, *PLAN_FIELDS, "adaptive_clipping")
    own = plan["adaptive_clipping"]
    fields(own, "quantile", "learning_rate", "bit_deviation", "smallest", "largest", "bit_unit")
    require(0 < real(own["quantile"]) < 1 and 0 < real(own["learning_rate"]) <= 1, "quantile and learning rate")
    require(
        real(own["smallest"]) <= real(plan["clipping_norm"]) <= real(own["largest"]), "the norm is within its bounds"
    )
    require(plan["quorum"] >= 20, "twenty parties")
    check_figures(plan, derived(plan))


def verify_sum(plan: Json, *, name: str) -> None:
    """A plan of fedsgd."""
    fields(plan, *PLAN_FIELDS, "strategy", "gradient_sum")
    require(plan["strategy"] == "fedsgd", "the strategy is fedsgd")
    own = plan["gradient_sum"]
    fields(own, "batch_cap", "declared_rows", "trusted_aggregator")
    trusted = plan["noise"]["noise_by"] == "aggregator"
    require(own["trusted_aggregator"] is trusted, "an aggregator that draws all noise is called trusted, and no other")
    require(name == "plan_fedsgd" + "_trusted" * trusted, "the name says what it is")
    require(set(own["declared_rows"]) == set(plan["cohort"]), "every party of the cohort declares its rows")
    require(min(own["declared_rows"].values()) >= 1, "nobody declares no rows")
    check_figures(plan, derived_of_sum(plan))
