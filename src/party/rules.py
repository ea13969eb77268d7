"""What an honest party checks before it trains, before it sends, before it opens. Pure; each refusal says why.

Everything is checked against what the party's kit pins (roster, public key) and against what the party computes itself;
nothing is believed because the aggregator says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..config import PartyConfig
from ..encryption.dealer import check_threshold
from ..encryption.scheme import Scheme
from ..errors import InvalidInput, KeyMaterialError, OpeningError, PlanError, PolicyError, SignatureError
from ..privacy.clipping import MIN_NORM
from ..privacy.events import NoisySum
from ..privacy.noise_plan import NoisePlan
from ..protocol.derive import derive_again, party_event
from ..protocol.plan import (
    LIST_KIND,
    OPENING_KIND,
    PLAN_KIND,
    ROOT_KIND,
    OpeningStatement,
    RootStatement,
    RoundPlan,
    signed_digest,
)
from ..protocol.roster import AGGREGATOR, Roster
from ..protocol.signing import Signed, open_signed
from .store import PartyRound, Stage

MAX_LOCAL_STEPS: Final = 1_000_000
"""Of one round: what a job may ask for at most."""
_JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
MIN_HONEST: Final = 2
"""A sum over one honest party is that party's update."""


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A round plan that this party accepts, what follows from it, and whose order it follows from (empty: nobody's)."""

    plan: RoundPlan
    digest: str
    noise: NoisePlan
    scientist: str = ""


def open_plan(signed: Signed, roster: Roster) -> tuple[RoundPlan, str]:
    """The plan in a statement signed by the roster's aggregator, and its digest; SignatureError otherwise."""
    statement = open_signed(signed, PLAN_KIND, verify_key=roster.aggregator_verify_key)
    return RoundPlan.from_statement(statement), signed_digest(signed, PLAN_KIND)


def check_plan(signed: Signed, roster: Roster, *, config: PartyConfig, scheme: Scheme, pinned: bool) -> CheckedPlan:
    """Accept a round plan, or say why not.

    Raises:
        SignatureError: not signed by the roster's aggregator.
        PlanError: it contradicts the kit, or its widths and variances do not follow from its settings.
        PolicyError: this party's policy does not allow it.
    """
    plan, digest = open_plan(signed, roster)
    _check_ranges(plan)
    if pinned or plan.roster_digest == roster.digest:
        _check_against_roster(plan, roster)
    elif roster.custody == "threshold":
        raise PlanError("the plan names another roster than this party's")
    _check_policy(plan, config)
    derived = derive_again(scheme, plan)
    _check_noise_policy(plan, derived.noise_plan, config)
    if derived.layout.body_bytes > config.limits.max_update_bytes:
        raise PolicyError("the plan's updates are larger than limits.max_update_bytes")
    return CheckedPlan(plan, digest, derived.noise_plan)


def _check_ranges(plan: RoundPlan) -> None:
    """Before anything is reserved for it: what no honest aggregator plans."""
    checks = {
        "job_id": _JOB_ID.fullmatch(plan.job_id) is not None,
        "round": 1 <= plan.round < 2**32,  # a batch header has four bytes for it
        "priced_rounds": 1 <= plan.priced_rounds < 2**32,
        "local.steps": 1 <= plan.local.steps <= MAX_LOCAL_STEPS,
        "local.sampling_rate": 0 < float(plan.local.sampling_rate) <= 1,
        "local.max_grad_norm": MIN_NORM <= float(plan.local.max_grad_norm) < math.inf,
        "local.noise_multiplier": 0 <= float(plan.local.noise_multiplier) < math.inf,
        "local.delta": 0 < float(plan.local.delta) < 1,
    }
    for field, holds in checks.items():
        if not holds:
            raise PlanError(f"the plan's {field} is out of range", field=field)


def _check_against_roster(plan: RoundPlan, roster: Roster) -> None:
    expected = {
        "federation": roster.federation,
        "key_id": roster.key_id,
        "roster_digest": roster.digest,
        "custody": roster.custody,
        "threshold": roster.threshold,
        "colluders": roster.colluders,
    }
    for field, value in expected.items():
        if getattr(plan, field) != value:
            raise PlanError(
                f"the plan's {field} is {getattr(plan, field)!r}, this party's kit says {value!r}", field=field
            )
    unknown = sorted(set(plan.cohort) - set(roster.names))
    if unknown or len(set(plan.cohort)) != len(plan.cohort):
        raise PlanError(f"the plan invites who is not in the roster, or somebody twice: {', '.join(unknown)}")
    if not 1 <= plan.quorum <= len(plan.cohort):
        raise PlanError(f"a quorum of {plan.quorum} does not fit {len(plan.cohort)} invited parties")
    if roster.custody == "threshold":
        try:
            check_threshold(
                roster.threshold,
                len(roster.holders),
                colluders=roster.colluders,
                quorum=plan.quorum,
                parties=len(plan.cohort),
            )
        except KeyMaterialError as error:
            raise PlanError(f"two sums could be opened that differ by one party: {error.message}") from error


def _check_policy(plan: RoundPlan, config: PartyConfig) -> None:
    policy = config.policy
    if plan.federation != config.federation:
        raise PolicyError(f"this party belongs to federation {config.federation!r}, not to {plan.federation!r}")
    if plan.scheme == "plaintext" and not policy.allow_plaintext_scheme:
        raise PolicyError("this party does not send unencrypted updates (policy.allow_plaintext_scheme)")
    trusted = plan.gradient_sum is not None and plan.noise.noise_by == "aggregator"
    if trusted and config.name in plan.cohort and not policy.allow_trusted_aggregator:
        raise PolicyError(
            "this party gives no aggregator the exact sum of its gradients (policy.allow_trusted_aggregator): the plan "
            "has all the noise drawn by the aggregator, which calls itself trusted"
        )
    opens_alone = plan.gradient_sum is not None and plan.custody == "aggregator" and plan.scheme != "plaintext"
    if opens_alone and config.name in plan.cohort and not policy.allow_trusted_aggregator:
        raise PolicyError(
            "this party gives no aggregator its gradients under a key that the aggregator holds "
            "(policy.allow_trusted_aggregator): opened by themselves they have one noise share, not those of a sum"
        )
    if plan.custody != config.keys.custody:
        raise PolicyError(f"this party's keys.custody is {config.keys.custody}, the plan's is {plan.custody}")
    if plan.quorum < policy.min_quorum:
        raise PolicyError(f"a sum of {plan.quorum} updates hides too little (policy.min_quorum {policy.min_quorum})")
    if plan.quorum - plan.colluders < MIN_HONEST:
        raise PlanError(
            f"with {plan.colluders} colluders a quorum of {plan.quorum} can leave one honest party alone in a sum"
        )
    if plan.colluders < config.privacy.colluders:
        raise PolicyError(
            f"the plan stands {plan.colluders} colluders, this party asks for {config.privacy.colluders} "
            "(privacy.colluders)"
        )
    if plan.model_bytes > config.limits.max_update_bytes:
        raise PolicyError(f"a model of {plan.model_bytes} bytes is larger than limits.max_update_bytes")


def _check_noise_policy(plan: RoundPlan, noise: NoisePlan, config: PartyConfig) -> None:
    """Of the noise that the parties draw, over what this party contributes: under fedsgd that is next to nothing."""
    least = config.policy.min_parties_noise_multiplier
    event = party_event(plan, noise, against="aggregator")
    drawn = event.noise_multiplier if isinstance(event, NoisySum) else 0.0
    if drawn < least:
        raise PolicyError(
            f"the noise that the parties draw has multiplier {drawn:.4g}, less than this party's {least:g} "
            "(policy.min_parties_noise_multiplier)"
        )


def check_contribution(plan: RoundPlan, config: PartyConfig) -> None:
    """Raises PlanError or PolicyError unless this party is invited, has data for the task, and (fedsgd) has declared
    as many rows as the plan says, and others not too many more."""
    if config.name not in plan.cohort:
        raise PlanError(f"party {config.name} is not invited to this round")
    if plan.task not in config.datasets:
        raise PolicyError(
            f"this party has no data for task {plan.task!r} (datasets: {', '.join(sorted(config.datasets)) or 'none'})"
        )
    declared = config.datasets[plan.task].declared_rows
    if plan.gradient_sum is not None and plan.gradient_sum.declared_rows[config.name] != declared:
        raise PlanError(
            f"the plan says that this party declares {plan.gradient_sum.declared_rows[config.name]} rows: it "
            f"declares {declared}",
            field="declared_rows",
        )
    _check_others_rows(plan, declared, config)


def _check_others_rows(plan: RoundPlan, declared: int, config: PartyConfig) -> None:
    """The sum is divided by the rows that all declare, and its slots are as wide as the largest needs: one party that
    declares rows without end has the model stand still, and everybody send more."""
    rows = plan.gradient_sum.declared_rows if plan.gradient_sum else {}
    most = config.policy.max_declared_rows_factor * declared
    beyond = [f"{name} {count}" for name, count in sorted(rows.items()) if count > most]
    if beyond:
        raise PolicyError(
            f"others declare more than {config.policy.max_declared_rows_factor:g} times this party's {declared} rows: "
            f"{', '.join(beyond)} (policy.max_declared_rows_factor)"
        )


def check_list(signed: Signed, roster: Roster, *, plan: RoundPlan, plan_digest: str) -> dict[str, RootStatement]:
    """The signed roots of a frozen list, by contributor.

    Raises:
        SignatureError: the list or one of its roots is not signed by whom it names, or a signer is not in the roster.
        InvalidInput: it is not a list of signed roots.
        PlanError: a root of another round, a contributor twice or not invited, fewer parties than the quorum, or the
            aggregator's noise missing or uncalled for.
    """
    statement = open_signed(signed, LIST_KIND, verify_key=roster.aggregator_verify_key)
    if statement.get("plan") != plan_digest:
        raise PlanError("the frozen list belongs to another round plan")
    roots: dict[str, RootStatement] = {}
    entries = statement.get("roots")
    if not isinstance(entries, list):
        raise InvalidInput("a frozen list is malformed")
    for entry in entries:
        root = _check_root(Signed.from_json(entry), roster, plan_digest=plan_digest)
        if root.contributor in roots:
            raise PlanError(f"the frozen list names {root.contributor} twice")
        roots[root.contributor] = root
    parties = set(roots) - {AGGREGATOR}
    if not parties <= set(plan.cohort):
        raise PlanError(f"the frozen list names who was not invited: {', '.join(sorted(parties - set(plan.cohort)))}")
    if len(parties) < plan.quorum:
        raise PlanError(f"the frozen list has {len(parties)} parties, the quorum is {plan.quorum}")
    if (AGGREGATOR in roots) != plan.aggregator_adds_noise:
        raise PlanError("the frozen list and the plan disagree on the aggregator's noise")
    return roots


def _check_root(signed: Signed, roster: Roster, *, plan_digest: str) -> RootStatement:
    if signed.signer != AGGREGATOR and signed.signer not in roster.names:
        raise SignatureError(f"a root is signed by {signed.signer!r}, who is not in the roster", signer=signed.signer)
    statement = open_signed(signed, ROOT_KIND, verify_key=roster.verify_key(signed.signer))
    root = RootStatement.from_statement(statement)
    if root.contributor != signed.signer:
        raise SignatureError(f"{signed.signer} signed a root in the name of {root.contributor}", signer=signed.signer)
    if root.plan != plan_digest:
        raise PlanError(f"the root of {root.contributor} belongs to another round plan")
    return root


def check_reveal(row: PartyRound, signed: Signed, roots: Mapping[str, RootStatement], *, name: str) -> str:
    """The list's digest, once sending is right: this party's own root is on it, and no other list was accepted before.

    Raises:
        PlanError: otherwise.
    """
    own = (row.root or {}).get("statement", "")
    if name not in roots or row.batch is None or roots[name].root != row.batch["root"] or not own:
        raise PlanError("the frozen list does not have this party's root")
    digest = signed_digest(signed, LIST_KIND)
    if row.list and row.list != digest:
        raise PlanError("this party has accepted another frozen list for this round")
    return digest


def check_opening(
    signed: Signed,
    roster: Roster,
    *,
    row: PartyRound,
    plan: RoundPlan,
    listed: Signed,
    roots: Mapping[str, RootStatement],
    name: str,
) -> OpeningStatement:
    """What an honest party may open; whether its root is right the party finds by multiplying itself.

    Raises:
        SignatureError: not signed by the roster's aggregator.
        OpeningError: another round, plan or list, a contributor twice or not listed, fewer than the quorum, this
            party's delivered update left out, the noise left out, or another aggregate of this round opened before.
    """
    # What a round may open is remembered under its name: under another name the plan would be opened a second time.
    if (row.job_id, row.number) != (plan.job_id, plan.round):
        raise OpeningError(f"the plan is of round {plan.round} of job {plan.job_id}, not of the round to be opened")
    statement = open_signed(signed, OPENING_KIND, verify_key=roster.aggregator_verify_key)
    opening = OpeningStatement.from_statement(statement)
    list_digest = signed_digest(listed, LIST_KIND)
    if opening.plan != row.plan or any(root.plan != row.plan for root in roots.values()):
        raise OpeningError("the opening belongs to another round plan")
    if opening.list != list_digest or (row.list and row.list != list_digest):
        raise OpeningError("the opening belongs to another frozen list")
    if list(opening.contributors) != sorted(set(opening.contributors)):
        raise OpeningError("the opening names a contributor twice, or not in order")
    unlisted = sorted(set(opening.contributors) - set(roots))
    if unlisted:
        raise OpeningError(f"the opening names who is not on the frozen list: {', '.join(unlisted)}")
    parties = [each for each in opening.contributors if each != AGGREGATOR]
    if len(parties) < max(plan.quorum, MIN_HONEST):
        raise OpeningError(f"the opening has {len(parties)} parties, the quorum is {plan.quorum}")
    if (AGGREGATOR in opening.contributors) != plan.aggregator_adds_noise:
        raise OpeningError("the aggregator's noise is not part of what is to be opened")
    if row.stage is Stage.DELIVERED and name not in opening.contributors:
        raise OpeningError("this party's delivered update is not part of what is to be opened")
    if row.aggregate_root and row.aggregate_root != opening.aggregate_root:
        raise OpeningError("this party has opened another aggregate of this round")
    return opening


def describe(plan: RoundPlan) -> dict[str, Any]:
    """What a plan asks of a party, for its log: public settings only."""
    return {
        "job": plan.job_id,
        "round": plan.round,
        "task": plan.task,
        "quorum": f"{plan.quorum}/{len(plan.cohort)}",
        "scheme": plan.scheme,
        "strategy": plan.strategy,
        "steps": plan.local.steps,
        "noise_multiplier": plan.local.noise_multiplier,
    }
