"""What every unit of work on a round carries as JSON parameters, read back in a worker: plan, scheme, cores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..encryption.registry import scheme_for
from ..encryption.scheme import Scheme
from .canonical import parse_canonical
from .keyring import Keyring
from .plan import RoundPlan

Params = Mapping[str, Any]
"""`plan`: the statement's text; `public`: the key as JSON text; `processes`: cores, 1 without it."""


def unit_plan(params: Params) -> RoundPlan:
    """The round plan, whose signature the role's main process has checked; InvalidInput when it is malformed."""
    statement = parse_canonical(params["plan"].encode())
    statement.pop("kind", None)
    return RoundPlan.from_statement(statement)


def unit_scheme(params: Params, plan: RoundPlan) -> Scheme:
    """The plan's scheme under the federation's key, with the cores that the unit may use."""
    # The role's main process has checked the key's size; here the smallest test keys must pass too.
    keyring = Keyring.from_json(json.loads(params["public"]), insecure_small=True)
    return scheme_for(
        plan.scheme,
        keyring.public,
        threshold_key=keyring.threshold_key,
        expected_ciphertexts=int(plan.layout["ciphertext_count"]),
        processes=unit_processes(params),
    )


def unit_processes(params: Params) -> int:
    """Cores that a unit may use: the role says how many, as it alone knows how many workers share them."""
    return int(params.get("processes", 1))
